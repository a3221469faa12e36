// Python bindings of the sample index: numpy arrays in and out, nothing converted on the way, the GIL released.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "sample_index.hpp"

namespace py = pybind11;

namespace {

template <typename T>
using Array = py::array_t<T, py::array::c_style>;

template <typename T>
std::size_t length_of(const Array<T>& array, const char* name) {
    if (array.ndim() != 1) {
        throw std::invalid_argument(std::string(name) + " has " + std::to_string(array.ndim()) + " axes, not 1");
    }
    return static_cast<std::size_t>(array.shape(0));
}

// Hands the vector's memory to numpy, which frees it.
template <typename T>
Array<T> to_numpy(std::vector<T>&& values) {
    auto* owned = new std::vector<T>(std::move(values));
    const py::capsule owner(owned, [](void* pointer) { delete static_cast<std::vector<T>*>(pointer); });
    return Array<T>(static_cast<py::ssize_t>(owned->size()), owned->data(), owner);
}

py::tuple best_fit_decreasing(const Array<std::int32_t>& lengths, std::int64_t capacity) {
    const std::size_t n = length_of(lengths, "lengths");
    const std::int32_t* data = lengths.data();
    mft::Packs packs;
    {
        const py::gil_scoped_release released;
        packs = mft::best_fit_decreasing(data, n, capacity);
    }
    return py::make_tuple(to_numpy(std::move(packs.sample_numbers)), to_numpy(std::move(packs.offsets)));
}

py::tuple best_fit_mixed(const Array<std::int32_t>& lengths, const Array<std::int32_t>& groups, std::int64_t capacity,
                         std::uint64_t seed) {
    const std::size_t n = length_of(lengths, "lengths");
    if (length_of(groups, "groups") != n) throw std::invalid_argument("lengths and groups differ in length");
    const auto *lengths_data = lengths.data(), *groups_data = groups.data();
    mft::Packs packs;
    {
        const py::gil_scoped_release released;
        packs = mft::best_fit_mixed(lengths_data, groups_data, n, capacity, seed);
    }
    return py::make_tuple(to_numpy(std::move(packs.sample_numbers)), to_numpy(std::move(packs.offsets)));
}

Array<std::int64_t> balance(const Array<std::int64_t>& costs, std::int64_t ranks) {
    const std::size_t n = length_of(costs, "costs");
    const std::int64_t* data = costs.data();
    std::vector<std::int64_t> rows;
    {
        const py::gil_scoped_release released;
        rows = mft::balance(data, n, ranks);
    }
    return to_numpy(std::move(rows)).reshape({ranks, static_cast<std::int64_t>(n) / ranks});
}

Array<std::int64_t> count_packs(const Array<std::int64_t>& sample_numbers, const Array<std::int64_t>& offsets,
                                const Array<std::uint16_t>& tasks, const Array<std::int64_t>& supervised) {
    const std::size_t m = length_of(sample_numbers, "sample_numbers"), num_offsets = length_of(offsets, "offsets");
    const std::size_t n = length_of(tasks, "task_of_sample");
    if (length_of(supervised, "supervised_of_sample") != n) {
        throw std::invalid_argument("task_of_sample and supervised_of_sample differ in length");
    }
    const auto *m_data = sample_numbers.data(), *o_data = offsets.data(), *s_data = supervised.data();
    const auto* t_data = tasks.data();
    mft::PackCounts counts;
    {
        const py::gil_scoped_release released;
        counts = mft::count_packs(m_data, m, o_data, num_offsets, t_data, s_data, n);
    }
    const std::size_t rows = counts.pack.size();
    Array<std::int64_t> table({py::ssize_t{4}, static_cast<py::ssize_t>(rows)});
    std::int64_t* out = table.mutable_data();
    for (const auto* column : {&counts.pack, &counts.task, &counts.supervised_tokens, &counts.samples}) {
        out = std::copy(column->begin(), column->end(), out);
    }
    return table;
}

Array<std::int64_t> epoch_order(std::int64_t n, std::uint64_t seed) {
    std::vector<std::int64_t> order;
    {
        const py::gil_scoped_release released;
        order = mft::epoch_order(n, seed);
    }
    return to_numpy(std::move(order));
}

Array<std::int64_t> mixed_order(const Array<std::int32_t>& groups, std::uint64_t seed) {
    const std::size_t n = length_of(groups, "groups");
    const std::int32_t* data = groups.data();
    std::vector<std::int64_t> order;
    {
        const py::gil_scoped_release released;
        const std::vector<std::uint32_t> mixed = mft::mixed_order(data, n, seed);
        order.assign(mixed.begin(), mixed.end());
    }
    return to_numpy(std::move(order));
}

Array<std::int32_t> rarest_tasks(const Array<std::int64_t>& packs, const Array<std::int64_t>& tasks,
                                 const Array<std::int64_t>& supervised, std::int64_t num_packs) {
    const std::size_t m = length_of(packs, "packs");
    if (length_of(tasks, "tasks") != m || length_of(supervised, "supervised_tokens") != m) {
        throw std::invalid_argument("packs, tasks and supervised_tokens differ in length");
    }
    const auto *p_data = packs.data(), *t_data = tasks.data(), *s_data = supervised.data();
    std::vector<std::int32_t> rarest;
    {
        const py::gil_scoped_release released;
        rarest = mft::rarest_tasks(p_data, t_data, s_data, m, num_packs);
    }
    return to_numpy(std::move(rarest));
}

}  // namespace

PYBIND11_MODULE(_sample_index, module) {
    module.doc() = "Packing, epoch order and counts; the contracts are in csrc/sample_index.hpp.";
    module.def("best_fit_decreasing", &best_fit_decreasing, py::arg("lengths").noconvert(), py::arg("capacity"),
               "int32 lengths [n], capacity -> (sample numbers int64 [n], offsets int64 [packs + 1]).");
    module.def("best_fit_mixed", &best_fit_mixed, py::arg("lengths").noconvert(), py::arg("groups").noconvert(),
               py::arg("capacity"), py::arg("seed"),
               "int32 lengths [n], int32 groups [n], capacity, seed -> as best_fit_decreasing.");
    module.def("balance", &balance, py::arg("costs").noconvert(), py::arg("ranks"),
               "int64 costs [n], ranks -> int64 [ranks, n / ranks]: the row indices of each rank.");
    module.def("count_packs", &count_packs, py::arg("sample_numbers").noconvert(), py::arg("offsets").noconvert(),
               py::arg("task_of_sample").noconvert(), py::arg("supervised_of_sample").noconvert(),
               "-> int64 [4, rows]: pack, task, supervised tokens, samples; by pack, then task.");
    module.def("epoch_order", &epoch_order, py::arg("n"), py::arg("seed"), "A permutation of 0 .. n - 1, int64 [n].");
    module.def("mixed_order", &mixed_order, py::arg("groups").noconvert(), py::arg("seed"),
               "int32 groups [n], seed -> a permutation of 0 .. n - 1, int64 [n], in which groups are spread evenly.");
    module.def("rarest_tasks", &rarest_tasks, py::arg("packs").noconvert(), py::arg("tasks").noconvert(),
               py::arg("supervised_tokens").noconvert(), py::arg("num_packs"),
               "int64 [entries] each, packs -> int32 [packs]: the task that the fewest packs hold; 2^16 for none.");
}
