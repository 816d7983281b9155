// SPDX-License-Identifier: Apache-2.0
// The gradient of the input: dgates W_ih, each row to where its input lies. Here because the register tile of panel.h
// runs at the machine's rate wherever its instruction set is used.
#pragma once

#include "engine/columns.h"
#include "engine/sequence.h"

namespace tidegate::TIDEGATE_ISA {

template <class S>
class InputGradient {
    using A = computed<S>;
    using F = factor<S>;
    static constexpr int64_t block = 48;   // rows that pass over a panel while it is in the nearest cache

public:
    // Without `wanted` it is not to be used.
    InputGradient(const BackwardProblem& p, int64_t depth, int threads, bool wanted = true)
        : p_(p),
          positions_(p.rows),
          stride_(padded<F>(depth)),
          columns_(p.weight_ih, depth, wanted ? p.input_size : 0, p.rows.total, ceil_div(p.rows.total, block), p.poison),
          copies_(wanted ? threads * block * stride_ : 0, p.poison) {}

    void pack(const Crew& crew) const { columns_.pack(crew); }

    // Of the steps first .. last - 1, whose gates' gradients are there.
    void multiply(const Crew& crew, int64_t first, int64_t last) const {
        const int64_t begin = positions_.begin(first, last), end = positions_.end(first, last);
        const int64_t blocks = ceil_div(end - begin, block);
        // Fewer blocks than threads: each thread takes its columns of all of them.
        const bool by_columns = blocks < crew.size();
        const Crew alone(nullptr, 0, 1);
        const Crew &by_block = by_columns ? alone : crew, &by_column = by_columns ? crew : alone;
        for (int64_t i = by_block.begin(blocks); i < by_block.end(blocks); ++i) {
            const int64_t from = begin + i * block;
            multiply_block(by_column, copies_ + crew.rank() * block * stride_, from, end - from < block ? end - from : block);
        }
    }

private:
    void multiply_block(const Crew& crew, F* rows, int64_t first, int64_t count) const {
        int64_t places[block];
        positions_.places(first, count, places);
        const S* from = static_cast<const S*>(p_.dgates) + first * p_.dgates_stride;
        // Padded, so that rows do not fall on one cache set.
        for (int64_t row = 0; row < count; ++row, from += p_.dgates_stride)
            copy_factors<F>(rows + row * stride_, from, columns_.depth());
        S* const to = static_cast<S*>(p_.dinput);
        columns_.multiply(crew, rows, stride_, count, count, [&](int64_t row, int64_t column, int64_t valid, Vec<A> sum) {
            S* at = to + places[row] * columns_.columns + column;
            store(at, p_.adds_to_dinput ? load(at, valid) + sum : sum, valid);
        });
    }

    const BackwardProblem& p_;
    const Positions positions_;
    const int64_t stride_;
    const Columns<S> columns_;
    const Buffer<F> copies_;   // of a block's rows, by thread
};

// After the problem's loop.
template <class Cell>
inline void run_input_gradient(const BackwardProblem& p) {
    if (!p.dinput || p.rows.total == 0) return;
    const int64_t depth = Cell::input_gates(p);
    const Sharing sharing =
        share_product(p.rows.total, static_cast<double>(depth) * static_cast<double>(p.input_size), p.threads);
    const InputGradient<typename Cell::Stored> gradient(p, depth, sharing.threads);
    auto body = [&](Crew& all, Team&) {
        gradient.pack(all);
        all.wait();
        gradient.multiply(all, 0, p.rows.steps);
    };
    run_shared(sharing, body);
}

}  // namespace tidegate::TIDEGATE_ISA
