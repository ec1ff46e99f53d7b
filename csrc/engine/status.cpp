#include "engine/status.h"

#include <cstdarg>
#include <cstdio>

namespace steepest {
namespace {
// A fixed buffer: reporting an error must not allocate.
thread_local char message[512] = "";
}  // namespace

steepest_status fail(steepest_status status, const char *format, ...) {
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(message, sizeof message, format, arguments);
  va_end(arguments);
  return status;
}

void clear_error() { message[0] = '\0'; }

}  // namespace steepest

extern "C" const char *steepest_last_error(void) { return steepest::message; }

extern "C" const char *steepest_status_name(steepest_status status) {
  switch (status) {
    case STEEPEST_OK: return "ok";
    case STEEPEST_ERROR_INVALID: return "invalid argument";
    case STEEPEST_ERROR_UNSUPPORTED: return "unsupported";
    case STEEPEST_ERROR_WORKSPACE: return "workspace too small";
    case STEEPEST_ERROR_CUDA: return "CUDA error";
    case STEEPEST_ERROR_INTERNAL: return "internal error";
  }
  return "unknown status";
}
