// SPDX-License-Identifier: Apache-2.0
#include "torch/tensors.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "engine/crew.h"

namespace tidegate {

bool poison = false;

namespace {

int32_t dtype_code(Type type) {
    return type == Type::f32    ? aoti_torch_dtype_float32()
           : type == Type::f64  ? aoti_torch_dtype_float64()
           : type == Type::bf16 ? aoti_torch_dtype_bfloat16()
                                : aoti_torch_dtype_float16();
}

Tensor make(int32_t dtype, int64_t element, const Dims& sizes, const Dims& strides) {
    AtenTensorHandle handle;
    if (aoti_torch_empty_strided(sizes.count, sizes.values, strides.values, dtype, aoti_torch_device_type_cpu(), 0,
                                 &handle) != AOTI_TORCH_SUCCESS)
        throw std::runtime_error("tidegate: out of memory for " + sizes.text());
    Tensor tensor(handle);
    const size_t bytes = static_cast<size_t>(tensor.numel() * element);
    if (poison && bytes) std::memset(data(tensor), 0xff, bytes);
    return tensor;
}

// Few numbers one by one: a copy by torch takes longer to begin than this to end.
constexpr int64_t few = 4096;
void copy_few(const Tensor& from, char* to, size_t element) {
    int64_t sizes[3] = {1, 1, 1}, strides[3] = {0, 0, 0};
    const int64_t dims = from.dim();
    for (int64_t i = 0; i < dims; ++i) {
        sizes[3 - dims + i] = from.size(i);
        strides[3 - dims + i] = from.stride(i) * static_cast<int64_t>(element);
    }
    for (int64_t i = 0; i < sizes[0]; ++i)
        for (int64_t j = 0; j < sizes[1]; ++j)
            for (int64_t k = 0; k < sizes[2]; ++k, to += element)
                std::memcpy(to, data(from) + i * strides[0] + j * strides[1] + k * strides[2], element);
}

}  // namespace

Dims Dims::contiguous_strides() const {
    Dims strides;
    strides.count = count;
    int64_t stride = 1;
    for (int64_t i = count; i-- > 0; stride *= std::max<int64_t>(values[i], 1)) strides.values[i] = stride;
    return strides;
}

std::string Dims::text() const {
    std::string result = "(";
    for (int64_t i = 0; i < count; ++i) result += (i ? ", " : "") + std::to_string(values[i]);
    return result + ")";
}

int64_t bytes_of(Type type) { return type == Type::f32 ? 4 : type == Type::f64 ? 8 : 2; }

Tensor make(Type type, const Dims& sizes, const Dims& strides) {
    return make(dtype_code(type), bytes_of(type), sizes, strides);
}

Tensor make(Type type, const Dims& sizes) { return make(type, sizes, sizes.contiguous_strides()); }

Tensor view(const Tensor& tensor, const Dims& sizes, const Dims& strides) {
    AtenTensorHandle handle;
    // 0: so much further than the tensor's own begin.
    if (aoti_torch__reinterpret_tensor(tensor.get(), sizes.count, sizes.values, strides.values, 0, &handle) !=
        AOTI_TORCH_SUCCESS)
        throw std::runtime_error("tidegate: a tensor could not be given other sizes");
    return Tensor(handle);
}

Tensor dense(const Tensor& tensor) {
    if (tensor.is_contiguous()) return tensor;
    if (!tensor.is_cpu() || tensor.dim() > 3) return torch::stable::contiguous(tensor);   // about to be refused
    // By the shim's own calls: torch::stable::contiguous goes through the dispatcher and takes ten times as long.
    Dims sizes;
    sizes.count = tensor.dim();
    for (int64_t i = 0; i < sizes.count; ++i) sizes.values[i] = tensor.size(i);
    const int64_t element = static_cast<int64_t>(tensor.element_size());
    Tensor copy = make(dtype_of(tensor), element, sizes, sizes.contiguous_strides());
    if (tensor.numel() <= few) copy_few(tensor, data(copy), static_cast<size_t>(element));
    else if (aoti_torch_copy_(copy.get(), tensor.get(), 0) != AOTI_TORCH_SUCCESS)
        throw std::runtime_error("tidegate: a tensor could not be copied");
    return copy;
}

[[noreturn]] void fail(const char* name, const std::string& expected, const std::string& got) {
    throw std::runtime_error(std::string(name) + ": expected " + expected + ", got " + got);
}

int32_t dtype_of(const Tensor& tensor) {
    int32_t dtype = -1;
    aoti_torch_get_dtype(tensor.get(), &dtype);
    return dtype;
}

Type type_of(const Tensor& tensor, const char* name) {
    if (!tensor.is_cpu()) fail(name, "a tensor on the cpu", "one on another device");
    const int32_t dtype = dtype_of(tensor);
    if (dtype == aoti_torch_dtype_float32()) return Type::f32;
    if (dtype == aoti_torch_dtype_float64()) return Type::f64;
    if (dtype == aoti_torch_dtype_bfloat16()) return Type::bf16;
    if (dtype == aoti_torch_dtype_float16()) return Type::f16;
    fail(name, "float32, float64, bfloat16 or float16", "another dtype");
}

// The shim's own calls: torch::stable::Tensor asks the same through conversions that cost as much as the answers.
void check(const Tensor& tensor, const char* name, int32_t dtype, const Dims& sizes) {
    int32_t device = -1;
    aoti_torch_get_device_type(tensor.get(), &device);
    if (device != aoti_torch_device_type_cpu()) fail(name, "a tensor on the cpu", "one on another device");
    if (dtype_of(tensor) != dtype) fail(name, "the dtype of the other tensors", "another");
    int64_t* got = nullptr;
    const int64_t dims = tensor.dim();
    if (aoti_torch_get_sizes(tensor.get(), &got) != AOTI_TORCH_SUCCESS) fail(name, sizes.text(), "no sizes");
    if (dims == sizes.count && std::equal(got, got + dims, sizes.values)) return;
    std::string came = "(";
    for (int64_t i = 0; i < dims; ++i) came += (i ? ", " : "") + std::to_string(got[i]);
    fail(name, sizes.text(), came + ")");
}

int thread_count() {
    return std::min(static_cast<int>(torch::stable::get_num_threads()), available_cpus());
}

}  // namespace tidegate
