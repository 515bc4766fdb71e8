// Parts of experts in the test files: a matrix of `rows` rows of `stride` bytes at an offset.
#pragma once

#include "offload/units/layout.h"

namespace layout_fixture {

inline stoker::Matrix matrix(int64_t rows, int64_t stride) {
  stoker::Matrix m;
  m.rows = rows;
  m.cols = stride;
  m.stride = stride;
  return m;
}

inline stoker::Layout::Part part(int32_t shard, uint64_t offset, int64_t rows, int64_t stride) {
  return {matrix(rows, stride), {shard, offset, static_cast<uint64_t>(rows * stride)}};
}

}  // namespace layout_fixture
