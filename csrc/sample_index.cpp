#include "sample_index.hpp"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <limits>
#include <numeric>
#include <queue>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#if defined(_MSC_VER) && !defined(MFT_PORTABLE)
#include <intrin.h>
#endif

namespace mft {

void refuse(const std::string& what) { throw std::invalid_argument(what); }

namespace {

// Index of the lowest bit that is set; `word` is not 0. MFT_PORTABLE takes the last branch, so that it can be tested.
std::size_t lowest_bit(std::uint64_t word) {
#if (defined(__GNUC__) || defined(__clang__)) && !defined(MFT_PORTABLE)
    return static_cast<std::size_t>(__builtin_ctzll(word));
#elif defined(_MSC_VER) && defined(_M_X64) && !defined(MFT_PORTABLE)
    unsigned long index;
    _BitScanForward64(&index, word);
    return index;
#else
    std::size_t index = 0;
    for (unsigned width = 32; width > 0; width /= 2) {
        const std::uint64_t low = (std::uint64_t{1} << width) - 1;
        if ((word & low) == 0) {
            word >>= width;
            index += width;
        }
    }
    return index;
#endif
}

// The set of remaining capacities that some open pack has, with "smallest member >= x" in O(levels): a bitmap of 64-bit
// words, and above it bitmaps of which words are not empty.
class CapacitySet {
public:
    explicit CapacitySet(std::size_t size) {
        do {
            size = (size + 63) / 64;
            levels_.emplace_back(size, 0);
        } while (size > 1);
    }

    void insert(std::size_t value) {
        for (auto& level : levels_) {
            level[value / 64] |= std::uint64_t{1} << (value % 64);
            value /= 64;
        }
    }

    void erase(std::size_t value) {
        for (auto& level : levels_) {
            level[value / 64] &= ~(std::uint64_t{1} << (value % 64));
            if (level[value / 64] != 0) return;
            value /= 64;
        }
    }

    // Smallest member >= value, or `none`.
    std::size_t next(std::size_t value, std::size_t none) const {
        for (std::size_t depth = 0; depth < levels_.size(); ++depth) {
            if (value / 64 >= levels_[depth].size()) return none;
            const std::uint64_t rest = levels_[depth][value / 64] >> (value % 64);
            if (rest != 0) {
                value += lowest_bit(rest);
                while (depth-- > 0) value = value * 64 + lowest_bit(levels_[depth][value]);
                return value;
            }
            value = value / 64 + 1;
        }
        return none;
    }

private:
    std::vector<std::vector<std::uint64_t>> levels_;
};

// Samples and packs are indexed with 32 bits inside: the loops wait for memory, so half the bytes take half the time.
using Number = std::uint32_t;
constexpr Number kNone = std::numeric_limits<Number>::max();

void check_lengths(const std::int32_t* lengths, std::size_t n, std::int64_t capacity) {
    if (capacity < 1) refuse("capacity " + std::to_string(capacity) + ": must be at least 1");
    if (n >= kNone) refuse(std::to_string(n) + " samples are too many to be packed at once");
    for (std::size_t i = 0; i < n; ++i) {
        if (lengths[i] < 1 || lengths[i] > capacity) {
            refuse("sample " + std::to_string(i) + " has length " + std::to_string(lengths[i]) + ", not within 1 .. " +
                   std::to_string(capacity));
        }
    }
}

struct Piece {
    Number sample;
    std::int32_t length;
};

// Sorts the samples that are longer than `above` to the front by decreasing length, with a counting sort; equal lengths
// keep their order, and so do all other samples.
std::vector<Piece> longest_first(const std::vector<Number>& order, const std::int32_t* lengths, std::int64_t capacity,
                                 std::int64_t above) {
    const auto rank = [&](std::int32_t length) {
        return static_cast<std::size_t>(capacity - std::max<std::int64_t>(length, above));
    };
    std::vector<std::size_t> start(static_cast<std::size_t>(capacity - above) + 2, 0);
    for (std::size_t i = 0; i < order.size(); ++i) ++start[rank(lengths[i]) + 1];
    for (std::size_t length = 1; length < start.size(); ++length) start[length] += start[length - 1];
    std::vector<Piece> sorted(order.size());
    for (const Number sample : order) sorted[start[rank(lengths[sample])]++] = {sample, lengths[sample]};
    return sorted;
}

// Puts each piece, in the given order, into the open pack with the smallest remaining capacity that suffices (of equal
// ones the one that got a sample last), or into a new one.
Packs best_fit(const std::vector<Piece>& pieces, std::int64_t capacity) {
    const std::size_t n = pieces.size(), none = static_cast<std::size_t>(capacity) + 1;
    CapacitySet capacities(none);
    // A stack of open packs for each remaining capacity, latest on top, linked through the packs.
    std::vector<Number> top(none, kNone), below, size_of_pack;
    std::vector<Number> pack_of(n);  // indexed like `pieces`
    for (std::size_t at = 0; at < n; ++at) {
        const auto length = static_cast<std::size_t>(pieces[at].length);
        std::size_t remaining = capacities.next(length, none);
        Number pack;
        if (remaining == none) {
            remaining = static_cast<std::size_t>(capacity);
            pack = static_cast<Number>(size_of_pack.size());
            size_of_pack.push_back(0);
            below.push_back(kNone);
        } else {
            pack = top[remaining];
            top[remaining] = below[pack];
            if (top[remaining] == kNone) capacities.erase(remaining);
        }
        pack_of[at] = pack;
        ++size_of_pack[pack];
        if (const std::size_t left = remaining - length; left > 0) {
            if (top[left] == kNone) capacities.insert(left);
            below[pack] = top[left];
            top[left] = pack;
        }
    }
    Packs packs;
    packs.offsets.resize(size_of_pack.size() + 1, 0);
    for (std::size_t p = 0; p < size_of_pack.size(); ++p) packs.offsets[p + 1] = packs.offsets[p] + size_of_pack[p];
    packs.sample_numbers.resize(n);
    std::vector<std::int64_t> next(packs.offsets.begin(), packs.offsets.end() - 1);
    for (std::size_t at = 0; at < n; ++at) {
        packs.sample_numbers[static_cast<std::size_t>(next[pack_of[at]]++)] = static_cast<std::int64_t>(pieces[at].sample);
    }
    return packs;
}

}  // namespace

Packs best_fit_decreasing(const std::int32_t* lengths, std::size_t n, std::int64_t capacity) {
    check_lengths(lengths, n, capacity);
    std::vector<Number> order(n);
    std::iota(order.begin(), order.end(), Number{0});
    return best_fit(longest_first(order, lengths, capacity, 0), capacity);
}

Packs best_fit_mixed(const std::int32_t* lengths, const std::int32_t* groups, std::size_t n, std::int64_t capacity,
                     std::uint64_t seed) {
    check_lengths(lengths, n, capacity);
    return best_fit(longest_first(mixed_order(groups, n, seed), lengths, capacity, capacity / 4), capacity);
}

std::vector<std::int64_t> balance(const std::int64_t* costs, std::size_t n, std::int64_t ranks) {
    if (ranks < 1 || n % static_cast<std::size_t>(ranks) != 0) {
        refuse(std::to_string(n) + " rows cannot be divided evenly among " + std::to_string(ranks) + " ranks");
    }
    if (n > 0 && *std::min_element(costs, costs + n) < 0) refuse("costs must not be negative");
    std::vector<std::int64_t> order(n);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](std::int64_t a, std::int64_t b) { return costs[a] > costs[b]; });
    const std::size_t each = n / static_cast<std::size_t>(ranks);
    using Load = std::pair<std::int64_t, std::size_t>;  // cost so far, rank; the first rank wins a tie
    std::priority_queue<Load, std::vector<Load>, std::greater<Load>> open;
    for (std::size_t rank = 0; each > 0 && rank < static_cast<std::size_t>(ranks); ++rank) open.emplace(0, rank);
    std::vector<std::size_t> taken(static_cast<std::size_t>(ranks), 0);
    std::vector<std::int64_t> rows(n);
    for (const std::int64_t row : order) {
        const auto [load, rank] = open.top();
        open.pop();
        rows[rank * each + taken[rank]++] = row;
        if (taken[rank] < each) open.emplace(load + costs[row], rank);
    }
    return rows;
}

PackCounts count_packs(const std::int64_t* sample_numbers, std::size_t m, const std::int64_t* offsets,
                       std::size_t num_offsets, const std::uint16_t* task_of_sample,
                       const std::int64_t* supervised_of_sample, std::size_t n) {
    if (num_offsets < 1 || offsets[0] != 0 || offsets[num_offsets - 1] != static_cast<std::int64_t>(m)) {
        refuse("offsets must run from 0 to " + std::to_string(m));
    }
    PackCounts counts;
    std::vector<std::pair<std::uint16_t, std::int64_t>> entries;  // (task, supervised tokens) of a pack's samples
    for (std::size_t pack = 0; pack + 1 < num_offsets; ++pack) {
        if (offsets[pack + 1] < offsets[pack] || offsets[pack + 1] > static_cast<std::int64_t>(m)) {
            refuse("offset " + std::to_string(offsets[pack + 1]) + " of pack " + std::to_string(pack + 1) +
                   " is below the one before, or above " + std::to_string(m));
        }
        entries.clear();
        for (std::int64_t at = offsets[pack]; at < offsets[pack + 1]; ++at) {
            const std::int64_t sample = sample_numbers[at];
            if (sample < 0 || sample >= static_cast<std::int64_t>(n)) {
                refuse("sample number " + std::to_string(sample) + " is outside 0 .. " + std::to_string(n) + " - 1");
            }
            entries.emplace_back(task_of_sample[sample], supervised_of_sample[sample]);
        }
        std::sort(entries.begin(), entries.end());
        for (std::size_t i = 0; i < entries.size(); ++i) {
            if (i == 0 || entries[i].first != entries[i - 1].first) {
                counts.pack.push_back(static_cast<std::int64_t>(pack));
                counts.task.push_back(entries[i].first);
                counts.supervised_tokens.push_back(0);
                counts.samples.push_back(0);
            }
            counts.supervised_tokens.back() += entries[i].second;
            counts.samples.back() += entries[i].second > 0 ? 1 : 0;
        }
    }
    return counts;
}

}  // namespace mft
