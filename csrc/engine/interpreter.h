// SPDX-License-Identifier: Apache-2.0
// Runs a program over time. Between two products a row goes through all instructions at once, in the nearest cache; a
// product takes all rows of a team, its columns shared by the team's threads. What is not a product every thread of a
// team computes for itself, so that they meet once a product.
#pragma once

#include "engine/program.h"

#include "engine/functions.h"
#include "engine/panel.h"
#include "engine/sequence.h"

namespace tidegate::TIDEGATE_ISA {

// An operand's numbers in turn, or one number for all of a group.
enum class Reading { vector, splat };

// From one of several like pieces of work, rows or groups, to the next.
struct Strides {
    int64_t to, a, b, c;
};

template <class A>
using ElementwiseLoop = void (*)(A* to, const A* a, const A* b, const A* c, int64_t count, int64_t pieces, Strides);

template <Reading reading, class A>
[[gnu::always_inline]] inline Vec<A> read_whole(const A* from, int64_t i) {
    if constexpr (reading == Reading::splat) return splat<A>(*from);
    else return load(from + i);
}
template <Reading reading, class A>
[[gnu::always_inline]] inline Vec<A> read_part(const A* from, int64_t i, int64_t count) {
    if constexpr (reading == Reading::splat) return splat<A>(*from);
    else return load(from + i, count);
}

template <Operation operation, class A, Reading ra, Reading rb, Reading rc>
void elementwise_loop(A* to, const A* a, const A* b, const A* c, int64_t count, int64_t pieces, Strides strides) {
    constexpr int lanes = width<A>;
    for (; pieces > 0; --pieces, to += strides.to, a += strides.a, b += strides.b, c += strides.c) {
        int64_t i = 0;
        for (; i + lanes <= count; i += lanes)
            store(to + i,
                  Function<operation, A>::apply(read_whole<ra>(a, i), read_whole<rb>(b, i), read_whole<rc>(c, i)));
        if (i < count)
            store(to + i,
                  Function<operation, A>::apply(read_part<ra>(a, i, count - i), read_part<rb>(b, i, count - i),
                                                read_part<rc>(c, i, count - i)),
                  count - i);
    }
}

template <Operation operation, class A, int operands>
ElementwiseLoop<A> find_loop(Reading ra, Reading rb, Reading rc) {
    using enum Reading;
    const auto with_c = [&]<Reading a, Reading b>() -> ElementwiseLoop<A> {
        if constexpr (operands < 3) return elementwise_loop<operation, A, a, b, splat>;
        else return rc == vector ? elementwise_loop<operation, A, a, b, vector> : elementwise_loop<operation, A, a, b, splat>;
    };
    const auto with_b = [&]<Reading a>() -> ElementwiseLoop<A> {
        if constexpr (operands < 2) return with_c.template operator()<a, splat>();
        else return rb == vector ? with_c.template operator()<a, vector>() : with_c.template operator()<a, splat>();
    };
    return ra == vector ? with_b.template operator()<vector>() : with_b.template operator()<splat>();
}

template <class A>
ElementwiseLoop<A> find_loop(Operation operation, Reading ra, Reading rb, Reading rc) {
    switch (operation) {
#define TIDEGATE_LOOP(name, operands) \
    case Operation::name: return find_loop<Operation::name, A, operands>(ra, rb, rc);
        TIDEGATE_LOOP(copy, 1)
        TIDEGATE_LOOP(neg, 1)
        TIDEGATE_LOOP(abs, 1)
        TIDEGATE_LOOP(sign, 1)
        TIDEGATE_LOOP(exp, 1)
        TIDEGATE_LOOP(expm1, 1)
        TIDEGATE_LOOP(log, 1)
        TIDEGATE_LOOP(log1p, 1)
        TIDEGATE_LOOP(sqrt, 1)
        TIDEGATE_LOOP(rsqrt, 1)
        TIDEGATE_LOOP(reciprocal, 1)
        TIDEGATE_LOOP(sigmoid, 1)
        TIDEGATE_LOOP(tanh, 1)
        TIDEGATE_LOOP(relu, 1)
        TIDEGATE_LOOP(sin, 1)
        TIDEGATE_LOOP(cos, 1)
        TIDEGATE_LOOP(erf, 1)
        TIDEGATE_LOOP(constant, 1)
        TIDEGATE_LOOP(add, 2)
        TIDEGATE_LOOP(sub, 2)
        TIDEGATE_LOOP(mul, 2)
        TIDEGATE_LOOP(div, 2)
        TIDEGATE_LOOP(maximum, 2)
        TIDEGATE_LOOP(minimum, 2)
        TIDEGATE_LOOP(pow, 2)
        TIDEGATE_LOOP(gt, 2)
        TIDEGATE_LOOP(ge, 2)
        TIDEGATE_LOOP(lt, 2)
        TIDEGATE_LOOP(le, 2)
        TIDEGATE_LOOP(eq, 2)
        TIDEGATE_LOOP(ne, 2)
        TIDEGATE_LOOP(sigmoid_gradient, 2)
        TIDEGATE_LOOP(tanh_gradient, 2)
        TIDEGATE_LOOP(where, 3)
        TIDEGATE_LOOP(clamp, 3)
        TIDEGATE_LOOP(muladd, 3)
#undef TIDEGATE_LOOP
        default: return nullptr;
    }
}

template <class A>
inline A sum_of(const A* from, int64_t count) {
    constexpr int lanes = width<A>;
    Vec<A> total{};
    int64_t i = 0;
    for (; i + lanes <= count; i += lanes) total += load(from + i);
    if (i < count) total += load(from + i, count - i);
    return sum<A>(total);
}

template <class A>
inline A dot_of(const A* a, const A* b, int64_t count) {
    constexpr int lanes = width<A>;
    Vec<A> total{};
    int64_t i = 0;
    for (; i + lanes <= count; i += lanes) total += load(a + i) * load(b + i);
    if (i < count) total += load(a + i, count - i) * load(b + i, count - i);
    return sum<A>(total);
}

template <class A>
inline A largest_of(const A* from, int64_t count) {
    A largest = from[0];
    for (int64_t i = 1; i < count; ++i) largest = from[i] > largest || from[i] != from[i] ? from[i] : largest;
    return largest;
}

template <class A>
class ProgramRun {
    static constexpr int wide = 2, lanes = width<A>;   // vectors in a panel; four are no faster on AVX2
    using Panel = Panels<A, wide>;

public:
    explicit ProgramRun(const ProgramProblem& p)
        : p_(p), program_(*p.program), panels_(count_panels()), banks_(first_input + inputs() + vectors()), steps_(size_of(program_.instructions)) {
        for (const Instruction& i : program_.instructions) add_step(i);
    }

    void run() {
        const LoopWork work = this->work();
        const Sharing sharing = share_loop(work, p_.threads);
        // The pool may start fewer threads than planned, whose teams then have more rows: what a team has is laid out
        // when that is known.
        const int64_t planned = sharing.threads * ceil_div(p_.rows.batch, sharing.teams);
        const int64_t fewer = p_.rows.batch + sharing.teams, places = planned > fewer ? planned : fewer;
        // Private to a thread: scratch, both versions of the states, a table of pointers; of a team: both versions of
        // the products' results.
        const int64_t own = program_.scratch_size + 2 * program_.state_size, common = 2 * program_.products_size;
        const Buffer<A> memory(places * own, p_.poison), results(places * common, p_.poison);
        const Buffer<const A*> tables(places * banks_, false);
        const Buffer<int64_t> strides(sharing.threads * banks_, false);
        const Buffer<LiveRow> lists(sharing.threads * p_.rows.batch, false);
        auto body = [&](Crew& all, Team& team) {
            pack(all);
            all.wait();
            if (all.dismissed()) return;
            const int64_t rows = ceil_div(p_.rows.batch, team.count);
            Share share(p_.rows, team, lists + all.rank() * p_.rows.batch);
            A* const mine = memory + all.rank() * rows * own;
            A* const my_states = mine + rows * program_.scratch_size;
            A* const ours = results + team.index * rows * common;
            Thread thread{.crew = team.crew,
                          .share = share,
                          .scratch_rows = mine,
                          .state_rows = {my_states, my_states + rows * program_.state_size},
                          .product_rows = {ours, ours + rows * program_.products_size},
                          .table = tables + all.rank() * rows * banks_,
                          .strides = strides + all.rank() * banks_,
                          .are_even = true};
            start(thread);
            for (int64_t step = 0; step < p_.rows.steps && share.live(step) > 0 && !team.crew.dismissed(); ++step) {
                share.enter(step);
                run_step(thread, step);
            }
        };
        run_shared(sharing, body);
    }

private:
    struct Thread {
        Crew& crew;
        Share& share;
        A* scratch_rows;
        A* state_rows[2];
        A* product_rows[2];
        const A** table;   // by row and bank
        int64_t* strides;  // by bank, from a row to the next, where `are_even`
        bool are_even;
    };

    // An instruction as it is run.
    struct Step {
        const Instruction* instruction;
        ElementwiseLoop<A> loop;   // null for what is not elementwise
        int64_t each;              // numbers of a group
        struct Place {
            int64_t bank, offset, group;   // group: from a group's numbers to the next's
        } result, operand[3];
        int64_t first_panels;      // of a product
    };

    template <class T>
    static int64_t size_of(const std::vector<T>& values) {
        return static_cast<int64_t>(values.size());
    }
    int64_t inputs() const { return size_of(program_.input_sizes); }
    int64_t vectors() const { return size_of(program_.vector_sizes); }
    static bool is_product(const Instruction& i) { return i.operation >= Operation::product; }
    const MatrixShape& matrix_of(const Instruction& i) const { return program_.matrices[static_cast<size_t>(i.matrix)]; }

    int64_t count_panels() const {
        int64_t count = 0;
        for (const Instruction& i : program_.instructions)
            if (is_product(i)) count += matrix_of(i).blocks;
        return count;
    }

    void add_step(const Instruction& i) {
        Step step{.instruction = &i, .loop = nullptr, .each = i.size / i.groups, .result = place(i.result, i), .operand = {}, .first_panels = 0};
        for (size_t k = 0; k < i.operands.size() && k < 3; ++k) step.operand[k] = place(i.operands[k], i);
        if (i.operation < Operation::sum) {
            const auto reading = [&](size_t k) {
                return k < i.operands.size() && i.operands[k].size == i.size && step.each > 1 ? Reading::vector : Reading::splat;
            };
            // Groups of one number each are one group.
            if (step.each == 1 && i.groups > 1) {
                bool all_whole = true;
                for (const Operand& o : i.operands) all_whole = all_whole && (o.size == i.size || o.size == 1);
                if (all_whole) {
                    step.each = i.size;
                    const auto whole = [&](size_t k) {
                        return k < i.operands.size() && i.operands[k].size == i.size ? Reading::vector : Reading::splat;
                    };
                    step.loop = find_loop<A>(i.operation, whole(0), whole(1), whole(2));
                }
            }
            if (!step.loop) step.loop = find_loop<A>(i.operation, reading(0), reading(1), reading(2));
        } else if (is_product(i)) {
            step.first_panels = made_panels_;
            const MatrixShape& m = matrix_of(i);
            const bool transposed = i.operation == Operation::product_transposed;
            const int64_t in = transposed ? m.rows : m.columns, out = transposed ? m.columns : m.rows;
            for (int64_t block = 0; block < m.blocks; ++block, ++made_panels_)
                panels_.emplace_back(ceil_div(out, wide * lanes), in, p_.poison);
        }
        steps_.emplace_back(step);
        ++step_count_;
    }

    typename Step::Place place(const Operand& operand, const Instruction& i) const {
        const int64_t group = operand.size == i.size ? i.size / i.groups : operand.size == i.groups ? 1 : 0;
        return {operand.bank, operand.offset, group};
    }

    LoopWork work() const {
        double flops = 0;
        int64_t most_panels = 1;
        for (const Instruction& i : program_.instructions) {
            if (is_product(i)) {
                const MatrixShape& m = matrix_of(i);
                flops += 2.0 * static_cast<double>(i.groups * m.rows * m.columns);
                const int64_t panels = i.groups * ceil_div(i.size / i.groups, wide * lanes);
                most_panels = panels > most_panels ? panels : most_panels;
            } else {
                flops += 4.0 * static_cast<double>(i.size);
            }
        }
        return {.rows = most_rows(p_.rows),
                .steps = p_.rows.steps,
                .positions = p_.rows.total,
                .panels = most_panels,
                .row_flops = flops,
                .barrier_flops = forward_barrier_flops,
                .input_flops = 0};
    }

    void pack(const Crew& all) const {
        int64_t dealt = 0;
        for (int64_t k = 0; k < step_count_; ++k) {
            const Step& step = steps_[k];
            const Instruction& i = *step.instruction;
            if (!is_product(i)) continue;
            const MatrixShape& m = matrix_of(i);
            const A* matrix = static_cast<const A*>(p_.matrices[i.matrix]);
            for (int64_t block = 0; block < m.blocks; ++block, matrix += m.rows * m.columns) {
                const Panel& panels = panels_[step.first_panels + block];
                for (int64_t panel = 0; panel < panels.count; ++panel)
                    if (all.dealt(dealt++)) pack_panel(i, m, panels, panel, matrix);
            }
        }
    }

    void pack_panel(const Instruction& i, const MatrixShape& m, const Panel& panels, int64_t panel, const A* matrix) const {
        if (i.operation == Operation::product_transposed) return panels.pack_columns(panel, panel, matrix, m.columns);
        const void* bias = i.bias < 0 ? nullptr : p_.vectors[i.bias];
        for (int c = 0; c < wide; ++c) {
            const int64_t first = (panel * wide + c) * lanes;
            panels.template pack<A>(panel, c, {matrix, bias}, first, first < m.rows ? m.rows - first : 0);
        }
    }

    A* scratch_of(const Thread& t, int64_t row) const { return t.scratch_rows + row * program_.scratch_size; }
    A* state_of(const Thread& t, int64_t step, int64_t row) const {
        return t.state_rows[step & 1] + row * program_.state_size;
    }
    A* products_of(const Thread& t, int64_t step, int64_t row) const {
        return t.product_rows[step & 1] + row * program_.products_size;
    }

    // The entering states; the final ones of rows without a step.
    void start(Thread& t) const {
        const Rows& rows = p_.rows;
        const auto count = size_of(program_.state_sizes);
        for (int64_t i = 0; i < t.share.all(); ++i) {
            const int64_t rank = t.share.rank(i), row = rows.order[rank];
            for (int64_t k = 0; k < count; ++k) {
                const int64_t size = program_.state_sizes[static_cast<size_t>(k)];
                const A* from = static_cast<const A*>(p_.initial[k]) + row * size;
                A* to = state_of(t, 0, i) + program_.state_offsets[static_cast<size_t>(k)];
                if (is_cut(k) && t.share.cut_at(0, rank)) std::memset(to, 0, bytes(size));
                else std::memcpy(to, from, bytes(size));
                if (rows.length[rank] == 0 && t.crew.rank() == 0)
                    std::memcpy(static_cast<A*>(p_.finals[k]) + row * size, from, bytes(size));
            }
            const A** table = t.table + i * banks_;
            table[scratch] = scratch_of(t, i);
            table[constants] = static_cast<const A*>(p_.constants);
            for (int64_t k = 0; k < vectors(); ++k) table[first_input + inputs() + k] = static_cast<const A*>(p_.vectors[k]);
        }
    }

    // Rows that go through the instructions together: as many as stay in the nearest cache.
    int64_t rows_together() const {
        constexpr int64_t nearest = 24 * 1024;
        const int64_t rows = nearest / (program_.scratch_size * static_cast<int64_t>(sizeof(A)));
        return rows < 1 ? 1 : rows;
    }

    // Where the inputs of a step's rows lie as far apart, they need no look at each row's place.
    void look_at_strides(Thread& t, int64_t count) const {
        t.strides[scratch] = program_.scratch_size;
        t.strides[products] = program_.products_size;
        t.strides[states] = program_.state_size;
        t.strides[constants] = 0;
        for (int64_t bank = first_input + inputs(); bank < banks_; ++bank) t.strides[bank] = 0;
        t.are_even = true;
        for (int64_t bank = first_input; bank < first_input + inputs(); ++bank) {
            const int64_t stride = count > 1 ? t.table[banks_ + bank] - t.table[bank] : 0;
            t.strides[bank] = stride;
            for (int64_t i = 2; i < count && t.are_even; ++i)
                t.are_even = t.table[i * banks_ + bank] - t.table[(i - 1) * banks_ + bank] == stride;
        }
    }

    static size_t bytes(int64_t count) { return static_cast<size_t>(count) * sizeof(A); }
    bool is_cut(int64_t state) const {
        return state < size_of(program_.state_sizes) - program_.through_resets;
    }

    void run_step(Thread& t, int64_t step) const {
        const int64_t count = t.share.live(step);
        for (int64_t i = 0; i < count; ++i) {
            const LiveRow& row = t.share[i];
            const A** table = t.table + i * banks_;
            table[products] = products_of(t, step, i);
            table[states] = state_of(t, step, i);
            for (int64_t k = 0; k < inputs(); ++k)
                table[first_input + k] =
                    static_cast<const A*>(p_.inputs[k]) + row.time * p_.time_strides[k] + row.row * p_.batch_strides[k];
        }
        look_at_strides(t, count);
        const int64_t together = t.are_even ? rows_together() : 1;
        for (int64_t first = 0; first < step_count_;) {
            if (is_product(*steps_[first].instruction)) {
                run_product(t, step, count, steps_[first++]);
                // Several in a row need to meet only once, unless one reads another.
                if (first == step_count_ || !is_product(*steps_[first].instruction) ||
                    steps_[first].operand[0].bank == products) {
                    t.crew.wait();
                    if (t.crew.dismissed()) return;
                }
                continue;
            }
            int64_t last = first;
            while (last < step_count_ && !is_product(*steps_[last].instruction)) ++last;
            for (int64_t i = 0; i < count; i += together)
                for (int64_t k = first; k < last; ++k)
                    run_rows(t, steps_[k], i, count - i < together ? count - i : together);
            first = last;
        }
        if (p_.writes_over_inputs) {
            t.crew.wait();
            if (t.crew.dismissed()) return;
        }
        for (int64_t i = 0; i < count; ++i) finish_row(t, step, i);
    }

    static A* at(const A* const* table, const typename Step::Place& place) {
        return const_cast<A*>(table[place.bank]) + place.offset;
    }

    void run_rows(const Thread& t, const Step& step, int64_t first, int64_t count) const {
        const A* const* table = t.table + first * banks_;
        if (step.loop && step.each == step.instruction->size) {
            const auto stride = [&](const typename Step::Place& place) { return t.strides[place.bank]; };
            step.loop(at(table, step.result), at(table, step.operand[0]), at(table, step.operand[1]),
                      at(table, step.operand[2]), step.each, count,
                      {stride(step.result), stride(step.operand[0]), stride(step.operand[1]), stride(step.operand[2])});
            return;
        }
        for (int64_t i = 0; i < count; ++i) run_other(step, table + i * banks_);
    }

    void run_other(const Step& step, const A* const* table) const {
        const Instruction& i = *step.instruction;
        A* to = at(table, step.result);
        const A* a = at(table, step.operand[0]);
        if (step.loop) {
            step.loop(to, a, at(table, step.operand[1]), at(table, step.operand[2]), step.each, i.groups,
                      {step.each, step.operand[0].group, step.operand[1].group, step.operand[2].group});
            return;
        }
        const int64_t size = i.operands[0].size;
        switch (i.operation) {
            case Operation::sum:
                for (int64_t g = 0; g < i.groups; ++g) to[g] = sum_of(a + g * (size / i.groups), size / i.groups);
                return;
            case Operation::mean: {
                const int64_t each = size / i.groups;
                for (int64_t g = 0; g < i.groups; ++g) to[g] = sum_of(a + g * each, each) / static_cast<A>(each);
                return;
            }
            case Operation::dot: {
                const int64_t each = size / i.groups;
                const A* const b = at(table, step.operand[1]);
                for (int64_t g = 0; g < i.groups; ++g) to[g] = dot_of(a + g * each, b + g * each, each);
                return;
            }
            case Operation::max:
                for (int64_t g = 0; g < i.groups; ++g) to[g] = largest_of(a + g * (size / i.groups), size / i.groups);
                return;
            case Operation::gather:
                for (int64_t k = 0; k < i.size; ++k) to[k] = a[i.indices[static_cast<size_t>(k)]];
                return;
            case Operation::scatter:
                std::memset(to, 0, bytes(i.size));
                for (int64_t k = 0; k < size; ++k) to[i.indices[static_cast<size_t>(k)]] += a[k];
                return;
            default:
                for (const Operand& operand : i.operands) {
                    const A* const from = table[operand.bank] + operand.offset;
                    if (from != to) std::memcpy(to, from, bytes(operand.size));
                    to += operand.size;
                }
        }
    }

    void run_product(Thread& t, int64_t step, int64_t count, const Step& product) const {
        const Instruction& i = *product.instruction;
        const MatrixShape& m = matrix_of(i);
        const bool transposed = i.operation == Operation::product_transposed;
        const int64_t in = transposed ? m.rows : m.columns, out = transposed ? m.columns : m.rows;
        const int64_t bank = product.operand[0].bank;
        const int64_t stride = bank == scratch ? program_.scratch_size : bank == states ? program_.state_size : program_.products_size;
        const A* const rows = at(t.table, product.operand[0]);
        A* const results = products_of(t, step, 0) + product.result.offset;
        // Blocks are shared by their panels, as if they stood side by side.
        const int64_t panels_of_block = ceil_div(out, wide * lanes), all = i.groups * panels_of_block;
        const int64_t begin = t.crew.begin(all), end = t.crew.end(all);
        for (int64_t group = begin / panels_of_block; group * panels_of_block < end; ++group) {
            const int64_t before = group * panels_of_block;
            const int64_t first = begin > before ? begin - before : 0;
            const int64_t last = end - before < panels_of_block ? end - before : panels_of_block;
            const Panel& panels = panels_[product.first_panels + (m.blocks == 1 ? 0 : group)];
            multiply(rows + group * in, stride, count, panels, first, last, 0, [&](int64_t row, int64_t panel, const A* sums) {
                A* const to = results + row * program_.products_size + group * out;
                for (int c = 0; c < wide; ++c) {
                    const int64_t unit = (panel * wide + c) * lanes;
                    if (unit < out) store(to + unit, load(sums + c * lanes), out - unit);
                }
            });
        }
    }

    void finish_row(Thread& t, int64_t step, int64_t i) const {
        const LiveRow& row = t.share[i];
        const A* const* table = t.table + i * banks_;
        A* const next = state_of(t, step + 1, i);
        const bool writes = t.crew.dealt(i);
        for (size_t k = 0; k < program_.next_states.size(); ++k) {
            const Operand& from = program_.next_states[k];
            const A* const value = table[from.bank] + from.offset;
            A* const to = next + program_.state_offsets[k];
            if (row.cut_next && is_cut(static_cast<int64_t>(k))) std::memset(to, 0, bytes(from.size));
            else std::memcpy(to, value, bytes(from.size));
            if (row.last && writes) std::memcpy(static_cast<A*>(p_.finals[k]) + row.row * from.size, value, bytes(from.size));
        }
        for (size_t k = 0; writes && k < program_.outputs.size(); ++k) {
            const Operand& from = program_.outputs[k];
            std::memcpy(static_cast<A*>(p_.outputs[k]) + row.place * from.size, table[from.bank] + from.offset, bytes(from.size));
        }
    }

    const ProgramProblem& p_;
    const Program& program_;
    Array<Panel> panels_;
    int64_t made_panels_ = 0;
    const int64_t banks_;
    Array<Step> steps_;
    int64_t step_count_ = 0;
};

}  // namespace tidegate::TIDEGATE_ISA
