// What the parts of the binding share: statuses as exceptions, rows that are turned down, counted bytes.
#pragma once

#include <pybind11/pybind11.h>

#include <string>

#include "rows.h"
#include "steepest/steepest.h"

namespace steepest_python {

[[noreturn]] inline void raise(steepest_status status) {
  const std::string message = steepest_last_error();
  switch (status) {
    case STEEPEST_ERROR_INVALID: throw py::value_error(message);
    case STEEPEST_ERROR_UNSUPPORTED: PyErr_SetString(PyExc_NotImplementedError, message.c_str()); break;
    default: PyErr_SetString(PyExc_RuntimeError, message.c_str());
  }
  throw py::error_already_set();
}

// Counts the bytes of all calls while it is on; asking for them costs a second check of every argument.
struct TrafficCounter {
  bool on = false;
  uint64_t bytes = 0;
};
inline TrafficCounter traffic;

inline py::object reject(const Mismatch &mismatch) { return py::make_tuple(mismatch.reason, mismatch.role, mismatch.row); }

enum Role { kParam, kGrad, kFirstState };

}  // namespace steepest_python
