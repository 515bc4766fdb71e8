/* A plugin of qemu-user that counts the instructions a program executes and writes their number to
 * standard error at the end: for mobile_bench/checks/instruction_counts.py, which compiles it.
 *
 * The declarations below are those of QEMU's plugin interface (qemu-plugin.h, which distributions
 * do not ship); STOKER_QEMU_PLUGIN is the version of it that the emulator wants.
 */
#include <inttypes.h>
#include <stdint.h>
#include <stdio.h>

typedef uint64_t qemu_plugin_id_t;
struct qemu_info_t;
struct qemu_plugin_tb; /* a block of instructions, as it is translated */

size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb* tb);
void qemu_plugin_register_vcpu_tb_trans_cb(qemu_plugin_id_t id,
                                           void (*f)(qemu_plugin_id_t, struct qemu_plugin_tb*));
void qemu_plugin_register_vcpu_tb_exec_cb(struct qemu_plugin_tb* tb, void (*f)(unsigned int, void*),
                                          int flags, void* data);
void qemu_plugin_register_atexit_cb(qemu_plugin_id_t id, void (*f)(qemu_plugin_id_t, void*),
                                    void* data);

#define EXPORT __attribute__((visibility("default")))
EXPORT int qemu_plugin_version = STOKER_QEMU_PLUGIN;

static uint64_t executed; /* the program has one thread */

static void on_execution(unsigned int cpu, void* instructions) {
  (void)cpu;
  executed += (uintptr_t)instructions;
}

static void on_translation(qemu_plugin_id_t id, struct qemu_plugin_tb* tb) {
  const int no_registers = 0;
  (void)id;
  qemu_plugin_register_vcpu_tb_exec_cb(tb, on_execution, no_registers,
                                       (void*)(uintptr_t)qemu_plugin_tb_n_insns(tb));
}

static void on_exit(qemu_plugin_id_t id, void* data) {
  (void)id;
  (void)data;
  fprintf(stderr, "instructions %" PRIu64 "\n", executed);
}

EXPORT int qemu_plugin_install(qemu_plugin_id_t id, const struct qemu_info_t* info, int argc,
                               char** argv) {
  (void)info;
  (void)argc;
  (void)argv;
  qemu_plugin_register_vcpu_tb_trans_cb(id, on_translation);
  qemu_plugin_register_atexit_cb(id, on_exit, 0);
  return 0;
}
