// Memory maps of files that become unreadable while they are read: truncated by another process, or on a device that fails.
//
// The kernel then sends SIGBUS, which ends a process without a word. Files that are watched here are named instead: in a
// guarded block the page reads as zeros and the block's end reports the file, so that nothing is computed with them;
// elsewhere the process writes one line to stderr and ends. Any other SIGBUS is what it was without this handler.
//
// Watching and guarding cost nothing while a file is read: the handler runs only after a fault.

#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace mft {

// Files that can be watched at the same time, and bytes of a path that are kept.
constexpr std::size_t kMostFiles = 4096, kPathBytes = 1024;

// Watches the pages of a map, and makes the handler the process's for SIGBUS if it is not.
//
// start, length: the bytes that are mapped; of a file of ``file_size`` bytes at ``path``. Of a longer path the end is kept.
// Returns a number for release. Throws std::runtime_error where kMostFiles are watched, and std::invalid_argument for a
// length of 0. Not to be called by two threads at once.
std::size_t watch(std::uintptr_t start, std::size_t length, std::uint64_t file_size, const std::string& path);

// Ends the watch with a number that watch returned. Throws std::invalid_argument for any other.
void release(std::size_t number);

// Begins a guarded block of this thread; blocks nest.
void enter_guard();

// Ends a guarded block. Returns the path of a watched file that a guarded block of any thread could not read, as long as it
// is watched: its pages are zeros from then on; empty if all could be read. Throws std::logic_error outside of a block.
std::string leave_guard();

}  // namespace mft
