// Options of an engine by name, from Python's keywords.
#pragma once

#include <nanobind/nanobind.h>

#include "runtime/core/engine.h"

// Throws TypeError for an option that there is not or a value of another type, Error(kOption) for a
// name that none of a list has.
stoker::EngineOptions engine_options(const nanobind::kwargs& given);
