// fastgist._build_info: what the extension beside it was built from and for. setup.py defines the FASTGIST_BUILT_*
// names as bare tokens (no quotes to survive a shell), which are made strings here.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "cpu/simd.h"

#define FASTGIST_STRING_(...) #__VA_ARGS__
#define FASTGIST_STRING(...) FASTGIST_STRING_(__VA_ARGS__)

namespace py = pybind11;

namespace {

std::string compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#elif defined(__GNUC__)
  return "gcc " __VERSION__;
#else
  return "unknown";
#endif
}

py::dict info() {
  using fastgist::cpu::Isa;
  std::vector<std::string> built = {name(Isa::kPortable)};
  if (FASTGIST_X86_DISPATCH) {
    built.emplace_back(name(Isa::kAvx2));
    built.emplace_back(name(Isa::kAvx512));
  }
  py::dict out;
  out["torch"] = FASTGIST_STRING(FASTGIST_BUILT_TORCH);                // whose headers were used
  out["torch_target"] = FASTGIST_STRING(FASTGIST_BUILT_TORCH_TARGET);  // the oldest that can load it
  out["compiler"] = compiler();
  out["cuda"] = FASTGIST_STRING(FASTGIST_BUILT_CUDA);              // nvcc's version, "" without CUDA kernels
  out["cuda_archs"] = FASTGIST_STRING(FASTGIST_BUILT_CUDA_ARCHS);  // "80,90a,100a"
  out["cpu_isas"] = built;                                         // compiled in
  out["cpu_isa"] = name(fastgist::cpu::isa());                     // taken on this machine
  out["openmp"] = "simd directives; threads are torch's";
  return out;
}

}  // namespace

PYBIND11_MODULE(_build_info, m) {
  m.doc() = "What the fastgist extension was built from and for.";
  m.def("info", &info, "A dict of strings: torch, compiler, CUDA version and architectures, CPU instruction sets.");
}
