#include "mapped_files.hpp"

#include <signal.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <stdexcept>

namespace mft {

namespace {

constexpr int kBadInput = 2;  // exit code of a command whose input has to be corrected

struct Watched {
    std::atomic<std::uintptr_t> start{0};  // 0: unused
    std::atomic<std::uintptr_t> end{0};
    std::atomic<bool> unreadable{false};
    std::uint64_t file_size = 0;
    char path[kPathBytes] = {};
};

Watched watched[kMostFiles];
std::atomic<std::size_t> most_used{0};  // all in use are before it
struct sigaction before;                // what another SIGBUS did
std::atomic<bool> handed_on{false};
std::uintptr_t page = 4096;
// without a call in the handler that may allocate
__attribute__((tls_model("initial-exec"))) thread_local int guards = 0;

// The functions below up to handle() are called in the handler: only what POSIX calls async-signal-safe, and mmap.

Watched* find(std::uintptr_t address) {
    for (std::size_t i = 0, n = most_used.load(); i < n; ++i) {
        const std::uintptr_t start = watched[i].start.load();
        if (start != 0 && address >= start && address < watched[i].end.load()) return &watched[i];
    }
    return nullptr;
}

void say(const char* text) {
    std::size_t left = std::strlen(text);
    while (left > 0) {
        const ssize_t count = write(STDERR_FILENO, text, left);
        if (count <= 0) return;
        text += count;
        left -= static_cast<std::size_t>(count);
    }
}

void end_process(const Watched& file) {
    struct stat now {};
    const bool shorter = stat(file.path, &now) == 0 && static_cast<std::uint64_t>(now.st_size) < file.file_size;
    say("error: ");
    say(file.path);
    say(shorter ? ": was cut off while it was read; restore it, or preprocess the data again\n"
                : ": cannot be read any more: the file was replaced, or the device or the connection to it fails; restore "
                  "it, or preprocess the data again\n");
    _exit(kBadInput);
}

void hand_on(int number, bool is_fault) {
    // the instruction that faulted runs again, under the handler that was there before; a second time, under none
    struct sigaction none {};
    none.sa_handler = SIG_DFL;
    sigaction(number, handed_on.exchange(true) ? &none : &before, nullptr);
    if (!is_fault) raise(number);
}

void handle(int number, siginfo_t* info, void*) {
    const bool is_fault = info->si_code > 0;
    // another handler that was called first, such as Python's faulthandler, raises the signal once more: the fault follows
    if (!is_fault && info->si_pid == getpid()) return;
    const auto address = reinterpret_cast<std::uintptr_t>(info->si_addr);
    Watched* file = is_fault ? find(address) : nullptr;
    if (file == nullptr) return hand_on(number, is_fault);
    if (guards == 0) end_process(*file);
    void* const at = reinterpret_cast<void*>(address & ~(page - 1));
    if (mmap(at, page, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == MAP_FAILED) end_process(*file);
    file->unreadable.store(true);
}

void install() {
    struct sigaction now {};
    if (sigaction(SIGBUS, nullptr, &now) != 0 || ((now.sa_flags & SA_SIGINFO) && now.sa_sigaction == handle)) return;
    page = static_cast<std::uintptr_t>(sysconf(_SC_PAGESIZE));
    before = now;
    struct sigaction ours {};
    ours.sa_sigaction = handle;
    ours.sa_flags = SA_SIGINFO | SA_ONSTACK;
    sigemptyset(&ours.sa_mask);
    sigaction(SIGBUS, &ours, nullptr);
}

}  // namespace

std::size_t watch(std::uintptr_t start, std::size_t length, std::uint64_t file_size, const std::string& path) {
    if (start == 0 || length == 0) throw std::invalid_argument("a map of " + std::to_string(length) + " bytes");
    std::size_t number = 0;
    while (number < kMostFiles && watched[number].start.load() != 0) ++number;
    if (number == kMostFiles) throw std::runtime_error(std::to_string(kMostFiles) + " files are mapped at once");
    install();
    Watched& file = watched[number];
    file.unreadable.store(false);
    file.file_size = file_size;
    const std::string kept = path.substr(path.size() - std::min(path.size(), kPathBytes - 1));
    std::copy(kept.begin(), kept.end(), file.path);
    file.path[kept.size()] = '\0';
    // a page that holds the first or the last byte belongs to the map
    file.end.store((start + length + page - 1) & ~(page - 1));
    most_used.store(std::max(most_used.load(), number + 1));
    file.start.store(start & ~(page - 1));
    return number;
}

void release(std::size_t number) {
    if (number >= kMostFiles || watched[number].start.load() == 0) {
        throw std::invalid_argument("no file is watched under the number " + std::to_string(number));
    }
    watched[number].start.store(0);
}

void enter_guard() { ++guards; }

std::string leave_guard() {
    if (guards == 0) throw std::logic_error("no block is guarded");
    --guards;
    for (std::size_t i = 0, n = most_used.load(); i < n; ++i) {
        if (watched[i].start.load() != 0 && watched[i].unreadable.load()) return watched[i].path;
    }
    return "";
}

}  // namespace mft
