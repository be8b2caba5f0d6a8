// The element types that kernels are told of.
#pragma once

namespace fastgist {

enum class DType { kFloat32, kFloat64, kBFloat16, kFloat16 };

}  // namespace fastgist
