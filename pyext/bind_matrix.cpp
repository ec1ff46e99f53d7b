// The binding of steepest/matrix.h: a program is built once; a call states where the caller's arrays are.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <tuple>
#include <vector>

#include "steepest/matrix.h"

namespace py = pybind11;

namespace {

void require(steepest_status status) {
  if (status == STEEPEST_OK) return;
  const std::string message = steepest_last_error();
  if (status == STEEPEST_ERROR_INVALID) throw py::value_error(message);
  throw std::runtime_error(message);
}

using Shape = std::tuple<int64_t, int64_t, int32_t>;  // rows, columns, dtype
using Op = std::tuple<int32_t, uint32_t, int32_t, int32_t, int32_t, int32_t, double, double, double>;
using Array = std::tuple<uintptr_t, int64_t, int64_t>;  // address, ld, stride

// Operands [0, arrays) are the caller's; the rest is scratch.
class MatrixProgram {
 public:
  MatrixProgram(const std::vector<Shape> &operands, const std::vector<Op> &ops, size_t arrays) : arrays_(arrays) {
    if (arrays > operands.size()) throw py::value_error("MatrixProgram: more arrays than operands");
    for (const auto &[rows, cols, dtype] : operands) operands_.push_back({rows, cols, dtype, 0, nullptr, 0, 0});
    for (const Op &op : ops)
      ops_.push_back(std::apply([](auto... field) { return steepest_matrix_op{field...}; }, op));
  }

  uint64_t workspace(const std::vector<Array> &arrays, int64_t batch, int num_threads) const {
    uint64_t bytes = 0;
    const steepest_exec where = exec(num_threads);
    const std::vector<steepest_matrix_operand> operands = placed(arrays);
    const steepest_matrix_program call = program(operands, batch);
    require(steepest_matrix_workspace_size(&where, &call, &bytes));
    return bytes;
  }

  uint64_t run(const std::vector<Array> &arrays, int64_t batch, int num_threads, uintptr_t workspace,
               uint64_t bytes) const {
    const steepest_exec where = exec(num_threads);
    const std::vector<steepest_matrix_operand> operands = placed(arrays);
    const steepest_matrix_program call = program(operands, batch);
    uint64_t flops = 0;
    steepest_status status;
    {
      py::gil_scoped_release release;
      status = steepest_matrix_run(&where, &call, reinterpret_cast<void *>(workspace), bytes, &flops);
    }
    require(status);
    return flops;
  }

 private:
  static steepest_exec exec(int num_threads) {
    steepest_exec where = {};
    where.struct_size = sizeof where;
    where.device = STEEPEST_CPU;
    where.num_threads = num_threads;
    return where;
  }

  // The operands of one call; several threads may call at once.
  std::vector<steepest_matrix_operand> placed(const std::vector<Array> &arrays) const {
    if (arrays.size() != arrays_) throw py::value_error("MatrixProgram: wrong number of arrays");
    std::vector<steepest_matrix_operand> operands = operands_;
    for (size_t i = 0; i < arrays.size(); ++i) {
      const auto &[address, ld, stride] = arrays[i];
      operands[i].data = reinterpret_cast<void *>(address);
      operands[i].ld = ld;
      operands[i].stride = stride;
    }
    return operands;
  }

  steepest_matrix_program program(const std::vector<steepest_matrix_operand> &operands, int64_t batch) const {
    steepest_matrix_program call = {};
    call.struct_size = sizeof call;
    call.batch = batch;
    call.num_operands = static_cast<int64_t>(operands.size());
    call.operands = operands.data();
    call.num_ops = static_cast<int64_t>(ops_.size());
    call.ops = ops_.data();
    return call;
  }

  size_t arrays_;
  std::vector<steepest_matrix_operand> operands_;
  std::vector<steepest_matrix_op> ops_;
};

}  // namespace

void bind_matrix(py::module_ &m) {
  py::class_<MatrixProgram>(m, "MatrixProgram")
      .def(py::init<const std::vector<Shape> &, const std::vector<Op> &, size_t>(), py::arg("operands"), py::arg("ops"),
           py::arg("arrays"))
      .def("workspace", &MatrixProgram::workspace, py::arg("arrays"), py::arg("batch"), py::arg("num_threads"))
      .def("run", &MatrixProgram::run, py::arg("arrays"), py::arg("batch"), py::arg("num_threads"),
           py::arg("workspace"), py::arg("bytes"));
  m.def("matrix_clone", [] { return std::string(steepest_matrix_clone()); });
#define STEEPEST_EXPORT(name) m.attr("MATRIX_" #name) = static_cast<int>(STEEPEST_MATRIX_##name)
  STEEPEST_EXPORT(FLOAT32), STEEPEST_EXPORT(FLOAT64);
  STEEPEST_EXPORT(SYMMETRIC), STEEPEST_EXPORT(PRODUCT), STEEPEST_EXPORT(COMBINE), STEEPEST_EXPORT(NORMALISE);
  STEEPEST_EXPORT(SYMMETRISE), STEEPEST_EXPORT(NORM), STEEPEST_EXPORT(DIVIDE), STEEPEST_EXPORT(SPECTRAL_BOUND);
  STEEPEST_EXPORT(TRANSPOSE_A), STEEPEST_EXPORT(TRANSPOSE_B);
#undef STEEPEST_EXPORT
}
