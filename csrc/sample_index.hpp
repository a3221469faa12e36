// The sample index: which samples share a pack, in which order packs are used, and what each pack counts.
//
// Plain C++17 on vectors; no Python, no torch. All functions are deterministic: the same input gives the same output on
// every machine and with every library version. Bad input throws std::invalid_argument with the numbers in it.

#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace mft {

// Throws std::invalid_argument.
[[noreturn]] void refuse(const std::string& what);

struct Packs {
    std::vector<std::int64_t> sample_numbers;  // indices of the samples of pack 0, then of pack 1, …
    std::vector<std::int64_t> offsets;         // offsets[p] .. offsets[p + 1] are the samples of pack p; size packs + 1
};

// Best-fit decreasing: samples from the longest to the shortest (equal lengths in input order), each into the open pack
// with the smallest remaining capacity that suffices, or into a new one. Time O(n + capacity) for n samples.
//
// lengths: tokens of each of n samples. capacity: tokens of a pack.
// Throws if capacity < 1, a length is < 1 or > capacity, or there are 2^32 - 1 samples or more.
Packs best_fit_decreasing(const std::int32_t* lengths, std::size_t n, std::int64_t capacity);

// Best fit in an order that spreads every group evenly over the packs: samples longer than a quarter of a pack from the
// longest to the shortest (equal lengths in the order of mixed_order), then all others in the order of mixed_order, each
// into the open pack with the smallest remaining capacity that suffices, or into a new one.
//
// lengths, capacity: as above. groups: group of each sample, 0 .. kMostGroups - 1. seed: of mixed_order.
// Throws as best_fit_decreasing and mixed_order.
Packs best_fit_mixed(const std::int32_t* lengths, const std::int32_t* groups, std::size_t n, std::int64_t capacity,
                     std::uint64_t seed);

// Distributes rows over ranks so that each rank gets the same number of rows and about the same cost: from the most
// expensive row to the cheapest (equal costs in input order), each to the rank with the lowest cost so far that has fewer
// than n / ranks rows (the first of equal ranks).
//
// costs [n]: of each row, in any unit. Returns row indices [n]: n / ranks of rank 0, then of rank 1, …; the rows of a rank
// from the most expensive to the cheapest.
// Throws if ranks < 1, n is not a multiple of it, or a cost is negative.
std::vector<std::int64_t> balance(const std::int64_t* costs, std::size_t n, std::int64_t ranks);

struct PackCounts {  // one entry for each pack and task that occurs in it, sorted by pack, then task
    std::vector<std::int64_t> pack, task, supervised_tokens, samples;
};

// Supervised tokens, and samples that have any, of every task in every pack: the denominators of docs/LOSSES.md.
//
// sample_numbers [m], offsets [packs + 1]: see Packs. task_of_sample, supervised_of_sample [n]: task index and supervised
// tokens of every sample.
// Throws if the offsets do not rise from 0 to m, or a sample index is outside 0 .. n - 1.
PackCounts count_packs(const std::int64_t* sample_numbers, std::size_t m, const std::int64_t* offsets,
                       std::size_t num_offsets, const std::uint16_t* task_of_sample,
                       const std::int64_t* supervised_of_sample, std::size_t n);

// A permutation of 0 .. n - 1: Fisher-Yates, driven by std::mt19937_64 (whose output the standard fixes) through an
// unbiased bounded generator written here (std::uniform_int_distribution differs between standard libraries).
// Throws if n < 0.
std::vector<std::int64_t> epoch_order(std::int64_t n, std::uint64_t seed);

constexpr std::int32_t kNoTask = 1 << 16;  // a task has 16 bits
constexpr std::int32_t kMostGroups = kNoTask + 1;

// An order of n items in which each group is spread evenly: every part of the order has about the same share of a group's
// items, and is otherwise random.
//
// The permutation of epoch_order(n, seed) gives each item its rank j among the n_g items of its group. Walking it, each
// item takes the upper 32 bits u of the next output of the same generator, and the integer key
// floor((j · 2^32 + u) · 2^32 / n_g); items are sorted by key, equal keys by their place in the permutation. There are no
// floats, so the order is the same on every machine.
//
// groups [n]: group of each item, 0 .. kMostGroups - 1.
// Throws if a group is outside, or there are 2^32 - 1 items or more.
std::vector<std::uint32_t> mixed_order(const std::int32_t* groups, std::size_t n, std::uint64_t seed);

// The rarest task of each pack: of the tasks with a supervised token in it the one that the fewest packs have such tokens
// of, of equal ones the one with the lowest number; kNoTask where a pack has no supervised token.
//
// pack, task, supervised_tokens [m]: as in PackCounts. num_packs: of the split.
// Throws if num_packs is negative, or a pack or task is out of range.
std::vector<std::int32_t> rarest_tasks(const std::int64_t* pack, const std::int64_t* task,
                                       const std::int64_t* supervised_tokens, std::size_t m, std::int64_t num_packs);

}  // namespace mft
