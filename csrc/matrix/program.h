// Runs a checked program over a batch.
#pragma once

#include "steepest/matrix.h"

namespace steepest::matrix {

uint64_t workspace_bytes(const steepest_exec &exec, const steepest_matrix_program &program);

// Returns the floating-point operations executed.
uint64_t run(const steepest_exec &exec, const steepest_matrix_program &program, void *workspace);

}  // namespace steepest::matrix
