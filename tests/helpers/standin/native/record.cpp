#include "record.h"

#include <cxxabi.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cctype>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <mutex>
#include <sstream>
#include <unordered_map>
#include <unordered_set>
#include <vector>

namespace standin {
namespace {

struct Row {
  long thread;
  int kind, device;
  const char* name;
  const void* stream;
  bool operator==(const Row& o) const {
    return thread == o.thread && kind == o.kind && device == o.device && name == o.name && stream == o.stream;
  }
};
struct Hash {
  size_t operator()(const Row& r) const {
    size_t h = std::hash<const void*>()(r.name) * 31 + std::hash<const void*>()(r.stream);
    return (h * 31 + r.thread) * 31 + r.kind * 64 + r.device;
  }
};
struct Total {
  long calls = 0;
  size_t bytes = 0;
};
struct Stream {
  int device, priority;
};

// Never destroyed: libraries still call at the end of the process.
struct State {
  std::mutex mutex;
  std::unordered_map<Row, Total, Hash> rows;
  std::unordered_set<std::string> names;
  std::unordered_map<const void*, Stream> streams;
  void (*callback)(const char*, size_t) = nullptr;
};
State& state() {
  static State* one = new State();
  return *one;
}

long thread_number() {
  static thread_local long number = syscall(SYS_gettid);
  return number;
}

const char* const KINDS[] = {"kernel", "gemm", "copy", "fill", "wait", "order", "allocation", "select", "unmodelled"};

}  // namespace

// CUDA_VISIBLE_DEVICES as CUDA reads it: up to the first invalid entry, nothing if one is repeated, one MIG instance at most.
static std::vector<int> read_visible(int host, const char* text) {
  std::vector<int> chosen;
  if (!text) {
    for (int number = 0; number < host; ++number) chosen.push_back(number);
    return chosen;
  }
  std::istringstream parts(text);
  for (std::string part; std::getline(parts, part, ',');) {
    part.erase(0, part.find_first_not_of(' '));
    int number = -1;
    if (part.rfind("MIG-", 0) == 0) return host ? std::vector<int>{0} : chosen;
    if (part.rfind("GPU-", 0) == 0) {
      for (int other = 0; other < host && part.size() > 4; ++other)
        if (gpu_name(other).rfind(part, 0) == 0) number = other;
    } else if (!part.empty() && isdigit(part[0])) {
      number = atoi(part.c_str());
    }
    if (number < 0 || number >= host) break;
    if (std::find(chosen.begin(), chosen.end(), number) != chosen.end()) return {};
    chosen.push_back(number);
  }
  return chosen;
}

static const std::vector<int>& visible() {
  static const std::vector<int> chosen = [] {
    const char* text = getenv("STANDIN_DEVICES");
    return read_visible(text ? atoi(text) : 8, getenv("CUDA_VISIBLE_DEVICES"));
  }();
  return chosen;
}

int devices() { return visible().size(); }
int host_number(int device) { return visible()[device]; }

// Each byte of the identifier of GPU n is n + 1.
std::string gpu_name(int number) {
  char byte[3];
  snprintf(byte, sizeof byte, "%02x", number + 1);
  std::string name = "GPU-";
  for (int place = 0; place < 16; ++place) name += std::string(place == 4 || place == 6 || place == 8 || place == 10 ? "-" : "") + byte;
  return name;
}

int& device() {
  static thread_local int current = 0;  // a new thread starts on device 0, as in CUDA
  return current;
}

const char* intern(const std::string& text) {
  std::lock_guard<std::mutex> guard(state().mutex);
  return state().names.insert(text).first->c_str();
}

void count(Kind kind, const char* name, const void* stream, size_t bytes, int on) {
  Row row{thread_number(), kind, on < 0 ? device() : on, name, stream};
  std::lock_guard<std::mutex> guard(state().mutex);
  Total& total = state().rows[row];
  total.calls++;
  total.bytes += bytes;
}

void block(Kind kind, const char* name, const void* stream, size_t bytes) {
  count(kind, name, stream, bytes);
  auto callback = state().callback;
  if (callback) callback(name, bytes);
}

int stream_device(const void* stream) {
  std::lock_guard<std::mutex> guard(state().mutex);
  auto found = state().streams.find(stream);
  return found == state().streams.end() ? -1 : found->second.device;
}

int stream_priority(const void* stream) {
  std::lock_guard<std::mutex> guard(state().mutex);
  auto found = state().streams.find(stream);
  return found == state().streams.end() ? 0 : found->second.priority;
}

void* new_stream(int priority) {
  std::lock_guard<std::mutex> guard(state().mutex);
  void* stream = reinterpret_cast<void*>(uintptr_t(0x1000) + 16 * state().streams.size());
  state().streams[stream] = {device(), priority};
  return stream;
}

}  // namespace standin

// --- for Python

EXPORT void standin_callback(void (*callback)(const char*, size_t)) { standin::state().callback = callback; }

EXPORT void standin_reset() {
  std::lock_guard<std::mutex> guard(standin::state().mutex);
  standin::state().rows.clear();
}

// One line a row: thread, kind, device, stream, calls, bytes, name; valid until the next call.
EXPORT const char* standin_rows() {
  static std::string* text = new std::string();
  std::lock_guard<std::mutex> guard(standin::state().mutex);
  text->clear();
  for (auto& [row, total] : standin::state().rows) {
    int failed = 1;
    char* plain = abi::__cxa_demangle(row.name, nullptr, nullptr, &failed);
    *text += std::to_string(row.thread) + '\t' + standin::KINDS[row.kind] + '\t' + std::to_string(row.device) + '\t' +
             std::to_string(reinterpret_cast<uintptr_t>(row.stream)) + '\t' + std::to_string(total.calls) + '\t' +
             std::to_string(total.bytes) + '\t' + (failed ? row.name : plain) + '\n';
    free(plain);
  }
  return text->c_str();
}
