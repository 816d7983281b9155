// SPDX-License-Identifier: Apache-2.0
#include "engine/program.h"

#include <stdexcept>
#include <string>

namespace tidegate {
namespace {

// Reads numbers in turn, and refuses what cannot be.
class Reader {
public:
    Reader(const std::vector<int64_t>& code, Program& program) : code_(code), program_(program) {}

    int64_t next(int64_t low, int64_t high, const char* what) {
        if (at_ >= code_.size() || code_[at_] < low || code_[at_] > high)
            throw std::invalid_argument(std::string("program: a wrong ") + what + " at " + std::to_string(at_));
        return code_[at_++];
    }
    int64_t count(const char* what) { return next(0, static_cast<int64_t>(code_.size()), what); }
    int64_t size(const char* what) { return next(0, most, what); }

    std::vector<int64_t> sizes(const char* what) {
        std::vector<int64_t> result(static_cast<size_t>(count(what)));
        for (int64_t& value : result) value = size(what);
        return result;
    }

    Operand operand() {
        const Program& p = program_;
        const auto inputs = static_cast<int64_t>(p.input_sizes.size()), vectors = static_cast<int64_t>(p.vector_sizes.size());
        Operand result;
        result.bank = next(0, first_input + inputs + vectors - 1, "bank");
        result.offset = size("offset");
        result.size = size("size");
        const int64_t fixed[] = {p.scratch_size, p.products_size, p.state_size, p.constant_count};
        const int64_t k = result.bank - first_input;
        const int64_t room = k < 0         ? fixed[result.bank]
                             : k < inputs ? p.input_sizes[static_cast<size_t>(k)]
                                          : p.vector_sizes[static_cast<size_t>(k - inputs)];
        if (result.offset + result.size > room)
            throw std::invalid_argument("program: an operand beyond its memory at " + std::to_string(at_));
        return result;
    }

    bool done() const { return at_ == code_.size(); }

    static constexpr int64_t most = int64_t{1} << 40;

private:
    const std::vector<int64_t>& code_;
    const Program& program_;
    size_t at_ = 0;
};

[[noreturn]] void fail(const char* what) { throw std::invalid_argument(std::string("program: ") + what); }

void check(const Instruction& i, const Program& p) {
    const auto operands = static_cast<int64_t>(i.operands.size());
    const auto is = [&](Operation first, Operation last) { return i.operation >= first && i.operation <= last; };
    if (i.result.bank > products || i.result.size != i.size || i.groups < 1) fail("a wrong result");
    if (is(Operation::copy, Operation::muladd)) {
        const int64_t wanted = i.operation >= Operation::where ? 3 : i.operation >= Operation::add ? 2 : 1;
        if (operands != wanted || i.size % i.groups) fail("wrong operands");
        for (const Operand& o : i.operands)
            if (o.size != 1 && o.size != i.groups && o.size != i.size) fail("an operand of a wrong size");
    } else if (is(Operation::sum, Operation::dot)) {
        if (operands != (i.operation == Operation::dot ? 2 : 1) || i.size != i.groups) fail("a wrong reduction");
        for (const Operand& o : i.operands)
            if (o.size != i.operands[0].size || o.size % i.groups || o.size == 0) fail("a wrong reduction");
    } else if (is(Operation::gather, Operation::scatter)) {
        if (operands != 1) fail("wrong operands");
        const bool gathers = i.operation == Operation::gather;
        const int64_t room = gathers ? i.operands[0].size : i.size;
        if (static_cast<int64_t>(i.indices.size()) != (gathers ? i.size : i.operands[0].size)) fail("wrong indices");
        for (const int32_t index : i.indices)
            if (index < 0 || index >= room) fail("an index beyond its operand");
    } else if (i.operation == Operation::concat) {
        int64_t total = 0;
        for (const Operand& o : i.operands) total += o.size;
        if (total != i.size) fail("a wrong concat");
    } else {
        if (operands != 1 || i.matrix < 0 || i.result.bank != products || i.operands[0].bank > states) fail("a wrong product");
        const MatrixShape& m = p.matrices[static_cast<size_t>(i.matrix)];
        const bool transposed = i.operation == Operation::product_transposed;
        const int64_t in = transposed ? m.rows : m.columns, out = transposed ? m.columns : m.rows;
        if (m.blocks != 1 && m.blocks != i.groups) fail("a product of wrong blocks");
        if (i.operands[0].size != i.groups * in || i.size != i.groups * out) fail("a product of wrong sizes");
        if (i.bias >= 0 && (transposed || i.groups != 1 || p.vector_sizes[static_cast<size_t>(i.bias)] != out))
            fail("a wrong bias");
    }
}

}  // namespace

Program::Program(const std::vector<int64_t>& code) {
    Reader read(code, *this);
    state_sizes = read.sizes("state");
    state_offsets = read.sizes("state's place");
    input_sizes = read.sizes("input");
    vector_sizes = read.sizes("vector");
    matrices.resize(static_cast<size_t>(read.count("matrix")));
    for (MatrixShape& m : matrices) m = {read.size("matrix"), read.size("matrix"), read.size("matrix")};
    through_resets = read.next(0, static_cast<int64_t>(state_sizes.size()), "number of states");
    scratch_size = read.size("scratch");
    products_size = read.size("products");
    state_size = read.size("state");
    constant_count = read.size("constants");
    if (state_offsets.size() != state_sizes.size()) fail("states without places");
    for (size_t k = 0; k < state_sizes.size(); ++k)
        if (state_offsets[k] + state_sizes[k] > state_size) fail("a state beyond its memory");
    const auto vectors = static_cast<int64_t>(vector_sizes.size());
    instructions.resize(static_cast<size_t>(read.count("instruction")));
    for (Instruction& i : instructions) {
        i.operation = static_cast<Operation>(read.next(0, static_cast<int64_t>(Operation::count) - 1, "operation"));
        i.groups = read.next(1, Reader::most, "groups");
        i.result = read.operand();
        i.size = i.result.size;
        i.operands.resize(static_cast<size_t>(read.count("operands")));
        for (Operand& operand : i.operands) operand = read.operand();
        i.matrix = read.next(-1, static_cast<int64_t>(matrices.size()) - 1, "matrix");
        i.bias = read.next(-1, vectors - 1, "bias");
        i.indices.resize(static_cast<size_t>(read.count("indices")));
        for (int32_t& index : i.indices) index = static_cast<int32_t>(read.next(0, INT32_MAX, "index"));
        check(i, *this);
    }
    for (const int64_t size : state_sizes) {
        next_states.push_back(read.operand());
        if (next_states.back().size != size) fail("a state of another size");
    }
    outputs.resize(static_cast<size_t>(read.count("outputs")));
    for (Operand& operand : outputs) {
        operand = read.operand();
        output_sizes.push_back(operand.size);
    }
    if (!read.done()) fail("numbers after its end");
}

}  // namespace tidegate
