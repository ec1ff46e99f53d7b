// Status codes with a thread-local message: the C ABI's error channel.
#pragma once

#include "steepest/steepest.h"

namespace steepest {

// Records a printf-style message for steepest_last_error() and returns `status`.
steepest_status fail(steepest_status status, const char *format, ...) __attribute__((format(printf, 2, 3)));

void clear_error();

}  // namespace steepest
