#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "sample_index.hpp"

namespace mft {
namespace {

// Fisher-Yates through an unbiased bounded generator.
template <typename T>
void shuffle(std::vector<T>& values, std::mt19937_64& random) {
    for (std::uint64_t left = values.size(); left > 1; --left) {
        // Values at or above the largest multiple of `left` would favour small results: they are rejected.
        const std::uint64_t limit = left * (UINT64_MAX / left);
        std::uint64_t value = random();
        while (value >= limit) value = random();
        std::swap(values[static_cast<std::size_t>(left - 1)], values[static_cast<std::size_t>(value % left)]);
    }
}

// ((rank · 2^32 + fraction) · 2^32) / n for rank < n < 2^32, exactly and in 64 bits: with v = q · n + r the quotient of
// v · 2^32 is q · 2^32 plus that of r · 2^32, where q and r are below 2^32.
std::uint64_t mixing_key(std::uint64_t rank, std::uint64_t fraction, std::uint64_t n) {
    const std::uint64_t v = (rank << 32) | fraction;
    return ((v / n) << 32) + ((v % n) << 32) / n;
}

struct Keyed {
    std::uint64_t key;
    std::uint32_t place;

    bool operator<(const Keyed& other) const {
        return key != other.key ? key < other.key : place < other.place;
    }
};

// Sorts by key and place: a counting sort by the key's leading bits, then small sorts, since keys are nearly uniform.
std::vector<Keyed> sorted(const std::vector<Keyed>& items) {
    unsigned bits = 1;
    while (bits < 32 && (items.size() >> (bits + 2)) > 0) ++bits;  // two to four items a bucket
    const unsigned shift = 64 - bits;
    std::vector<std::uint32_t> start((std::size_t{1} << bits) + 1, 0);
    for (const Keyed& item : items) ++start[(item.key >> shift) + 1];
    for (std::size_t bucket = 1; bucket < start.size(); ++bucket) start[bucket] += start[bucket - 1];
    std::vector<Keyed> result(items.size());
    std::vector<std::uint32_t> next(start.begin(), start.end() - 1);
    for (const Keyed& item : items) result[next[item.key >> shift]++] = item;
    for (std::size_t bucket = 0; bucket + 1 < start.size(); ++bucket) {
        std::sort(result.begin() + start[bucket], result.begin() + start[bucket + 1]);
    }
    return result;
}

}  // namespace

std::vector<std::int64_t> epoch_order(std::int64_t n, std::uint64_t seed) {
    if (n < 0) refuse("n " + std::to_string(n) + ": must not be negative");
    std::vector<std::int64_t> order(static_cast<std::size_t>(n));
    for (std::int64_t i = 0; i < n; ++i) order[static_cast<std::size_t>(i)] = i;
    std::mt19937_64 random(seed);
    shuffle(order, random);
    return order;
}

std::vector<std::uint32_t> mixed_order(const std::int32_t* groups, std::size_t n, std::uint64_t seed) {
    if (n >= std::numeric_limits<std::uint32_t>::max()) refuse(std::to_string(n) + " items are too many to be mixed");
    std::vector<std::uint32_t> size(kMostGroups, 0), rank(kMostGroups, 0), order(n);
    for (std::size_t i = 0; i < n; ++i) {
        if (groups[i] < 0 || groups[i] >= kMostGroups) {
            refuse("item " + std::to_string(i) + " has group " + std::to_string(groups[i]) + ", not within 0 .. " +
                   std::to_string(kMostGroups - 1));
        }
        ++size[static_cast<std::size_t>(groups[i])];
        order[i] = static_cast<std::uint32_t>(i);
    }
    std::mt19937_64 random(seed);
    shuffle(order, random);
    std::vector<Keyed> items(n);
    for (std::size_t place = 0; place < n; ++place) {
        const auto group = static_cast<std::size_t>(groups[order[place]]);
        items[place] = {mixing_key(rank[group]++, random() >> 32, size[group]), static_cast<std::uint32_t>(place)};
    }
    const std::vector<Keyed> mixed = sorted(items);
    std::vector<std::uint32_t> result(n);
    for (std::size_t i = 0; i < n; ++i) result[i] = order[mixed[i].place];
    return result;
}

std::vector<std::int32_t> rarest_tasks(const std::int64_t* pack, const std::int64_t* task,
                                       const std::int64_t* supervised_tokens, std::size_t m, std::int64_t num_packs) {
    if (num_packs < 0) refuse("num_packs " + std::to_string(num_packs) + ": must not be negative");
    std::vector<std::int64_t> packs_of_task(kMostGroups, 0);
    packs_of_task[kNoTask] = std::numeric_limits<std::int64_t>::max();
    for (std::size_t i = 0; i < m; ++i) {
        if (pack[i] < 0 || pack[i] >= num_packs || task[i] < 0 || task[i] >= kNoTask) {
            refuse("entry " + std::to_string(i) + " has pack " + std::to_string(pack[i]) + " and task " +
                   std::to_string(task[i]) + ", not below " + std::to_string(num_packs) + " and " +
                   std::to_string(kNoTask));
        }
        if (supervised_tokens[i] > 0) ++packs_of_task[static_cast<std::size_t>(task[i])];
    }
    std::vector<std::int32_t> rarest(static_cast<std::size_t>(num_packs), kNoTask);
    for (std::size_t i = 0; i < m; ++i) {
        if (supervised_tokens[i] <= 0) continue;
        std::int32_t& best = rarest[static_cast<std::size_t>(pack[i])];
        const auto here = static_cast<std::int32_t>(task[i]);
        const std::int64_t held = packs_of_task[static_cast<std::size_t>(here)];
        const std::int64_t fewest = packs_of_task[static_cast<std::size_t>(best)];
        if (held < fewest || (held == fewest && here < best)) best = here;
    }
    return rarest;
}

}  // namespace mft
