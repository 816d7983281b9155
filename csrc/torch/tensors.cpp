// SPDX-License-Identifier: Apache-2.0
#include "torch/tensors.h"

#include <torch/csrc/stable/ops.h>

#include <cstring>
#include <stdexcept>

#include "torch/checks.h"
#include "engine/crew.h"

namespace tidegate {

bool poison = false;

namespace {

int32_t dtype_code(Type type) {
    return type == Type::f32   ? aoti_torch_dtype_float32()
           : type == Type::f64 ? aoti_torch_dtype_float64()
                               : aoti_torch_dtype_bfloat16();
}

Tensor make(int32_t dtype, size_t element, const int64_t* sizes, const int64_t* strides, int64_t dims) {
    AtenTensorHandle handle;
    if (aoti_torch_empty_strided(dims, sizes, strides, dtype, aoti_torch_device_type_cpu(), 0, &handle) !=
        AOTI_TORCH_SUCCESS)
        throw std::runtime_error("tidegate: out of memory for " + text(sizes, static_cast<size_t>(dims)));
    Tensor tensor(handle);
    const size_t bytes = static_cast<size_t>(tensor.numel()) * element;
    if (poison && bytes) std::memset(tensor.mutable_data_ptr(), 0xff, bytes);
    return tensor;
}

}  // namespace

size_t bytes_of(Type type) { return type == Type::f32 ? 4 : type == Type::f64 ? 8 : 2; }

Tensor make(int32_t dtype, size_t element, const int64_t* sizes, int64_t dims) {
    int64_t strides[3] = {1, 1, 1};
    for (int64_t i = dims - 1; i-- > 0;) strides[i] = strides[i + 1] * sizes[i + 1];
    return make(dtype, element, sizes, strides, dims);
}

Tensor make(Type type, const int64_t* sizes, int64_t dims) { return make(dtype_code(type), bytes_of(type), sizes, dims); }

Tensor make(Type type, const int64_t* sizes, const int64_t* strides, int64_t dims) {
    return make(dtype_code(type), bytes_of(type), sizes, strides, dims);
}

Tensor make(Type type, std::initializer_list<int64_t> sizes) {
    return make(type, sizes.begin(), static_cast<int64_t>(sizes.size()));
}

int thread_count() {
    const int threads = static_cast<int>(torch::stable::get_num_threads()), cpus = available_cpus();
    return threads < cpus ? threads : cpus;
}

}  // namespace tidegate
