// Python bindings of mapped_files.hpp.

#include <pybind11/pybind11.h>

#include "mapped_files.hpp"

namespace py = pybind11;

PYBIND11_MODULE(_mapped_files, module) {
    module.doc() = "Memory maps of files that become unreadable; the contracts are in csrc/mapped_files.hpp.";
    module.def("watch", &mft::watch, py::arg("start"), py::arg("length"), py::arg("file_size"), py::arg("path"),
               "address, bytes, bytes of the file, its path -> a number for release.");
    module.def("release", &mft::release, py::arg("number"), "End the watch of a file.");
    module.def("enter_guard", &mft::enter_guard, "Begin a guarded block of this thread.");
    module.def("leave_guard", &mft::leave_guard, "End a guarded block -> the path of an unreadable file, or ''.");
}
