// SPDX-License-Identifier: Apache-2.0
// The memory that a call's buffers lie in. Each calling thread keeps it for its next call: memory that is fresh from
// the system costs a page fault every 4 KiB, which for packed weights can be as much as all the arithmetic of a call.
#pragma once

#include <cstddef>

namespace tidegate {

// Memory aligned to a cache line, for this thread's call in hand; null for no bytes.
void* take_workspace(size_t bytes);

// Gives it back, in any order. Once all is back, the thread keeps one block of what its largest call took, if that is
// not more than the budget, until it ends or others need it.
void give_workspace_back(void* memory);

// What all threads together keep, so that many that called once do not hold memory for ever. A thread that needs a block
// beyond it takes those of threads that are in no call, the longest unused first.
constexpr size_t workspace_budget = size_t{256} << 20;

// Frees what threads keep that are in no call; the bytes that it was. Their next call takes fresh memory.
size_t release_workspaces();

// Bytes of all blocks, in use or kept.
size_t workspace_held();

}  // namespace tidegate
