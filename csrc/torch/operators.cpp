// SPDX-License-Identifier: Apache-2.0
#include "torch/operators.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <string>

#include "engine/crew.h"
#include "engine/isa.h"
#include "engine/workspace.h"
#include "torch/call.h"
#include "torch/program.h"

namespace tidegate {
namespace {

void parallel_for_of_torch(int64_t count, void (*body)(int64_t, int64_t, void*), void* context) {
    torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) { body(begin, end, context); });
}

// `forward` with weights packed ahead, for a stream: an argument that is not there costs as much as one that is.
Tensor advance(int64_t form, const Tensor& packed, const Tensor& input, const Tensor& h_0, const Optional& c_0) {
    const Optional none, h = h_0;
    return forward(form, packed, none, none, none, std::nullopt, input, h, c_0)[0];
}

Tensor activate(const Tensor& any_x, bool hyperbolic) {
    const Tensor x = dense(any_x);
    const Type type = type_of(x, "x");
    Tensor result = make(type, {x.numel()});
    active_kernels().activate(type, hyperbolic, x.const_data_ptr(), result.mutable_data_ptr(), x.numel());
    return result;
}

double multiply_adds(const Tensor& like, int64_t rounds) {
    return active_kernels().multiply_adds(type_of(like, "like"), rounds, thread_count());
}

int64_t release_memory() { return static_cast<int64_t>(release_workspaces()); }

std::string isa() { return active_kernels().name; }

std::string isas() {
    std::string result;
    for (const std::string& name : supported_isas()) result += (result.empty() ? "" : " ") + name;
    return result;
}

void use_isa(std::string name) { force_isa(name); }

void poison_buffers(bool on) { poison = on; }

}  // namespace
}  // namespace tidegate

STABLE_TORCH_LIBRARY(tidegate_cpu, m) {
    tidegate::set_parallel_for(tidegate::parallel_for_of_torch);
    m.def(
        "forward(int form, Tensor weight_ih, Tensor? weight_hh, Tensor? bias_ih, Tensor? bias_hh, Tensor[]? rest, "
        "Tensor input, Tensor(a!)? h_0=None, Tensor(b!)? c_0=None) -> Tensor[]");
    m.def(
        "backward(int form, Tensor(a!)[] saved, Tensor input, Tensor weight_ih, Tensor weight_hh, Tensor[]? rest, "
        "Tensor? grad_output, Tensor? grad_h_n, Tensor? grad_c_n, Tensor? grad_o, bool[] needs, "
        "bool overwrite) -> Tensor[]");
    m.def(
        "pack(int form, Tensor weight_ih, Tensor weight_hh, Tensor? bias_ih, Tensor? bias_hh, Tensor[]? rest) "
        "-> Tensor");
    m.def("advance(int form, Tensor packed, Tensor input, Tensor(a!) h_0, Tensor(b!)? c_0=None) -> Tensor");
    m.def(
        "run_program(Tensor code, Tensor constants, Tensor[] inputs, Tensor[] states, Tensor[] vectors, "
        "Tensor[] matrices, Tensor? lengths, Tensor? resets, int steps, int batch, bool reverse, int[] over=[]) "
        "-> Tensor[]");
    m.def("activate(Tensor x, bool hyperbolic) -> Tensor");
    m.def("multiply_adds(Tensor like, int rounds) -> float");
    m.def("release_memory() -> int");
    m.def("isa() -> str");
    m.def("isas() -> str");
    m.def("use_isa(str name) -> ()");
    m.def("poison_buffers(bool on) -> ()");
}

// Whatever the device: it is one of the things that are looked at.
STABLE_TORCH_LIBRARY_IMPL(tidegate_cpu, CompositeExplicitAutograd, m) {
    m.impl("forward", TORCH_BOX(&tidegate::forward));
    m.impl("backward", TORCH_BOX(&tidegate::backward));
    m.impl("pack", TORCH_BOX(&tidegate::pack));
    m.impl("advance", TORCH_BOX(&tidegate::advance));
    m.impl("run_program", TORCH_BOX(&tidegate::run_program));
    m.impl("activate", TORCH_BOX(&tidegate::activate));
    m.impl("multiply_adds", TORCH_BOX(&tidegate::multiply_adds));
    m.impl("release_memory", TORCH_BOX(&tidegate::release_memory));
    m.impl("isa", TORCH_BOX(&tidegate::isa));
    m.impl("isas", TORCH_BOX(&tidegate::isas));
    m.impl("use_isa", TORCH_BOX(&tidegate::use_isa));
    m.impl("poison_buffers", TORCH_BOX(&tidegate::poison_buffers));
}
