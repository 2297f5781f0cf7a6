// What the stand-in records: every call by kind, name, thread, device and stream, with how often it came and how many bytes it moved.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace standin {

enum Kind { KERNEL, GEMM, COPY, FILL, WAIT, ORDER, ALLOCATION, SELECT, UNMODELLED };

int devices();              // those that CUDA_VISIBLE_DEVICES leaves of the host's
int host_number(int device);  // the number of a visible device among the host's
std::string gpu_name(int number);
int& device();  // the calling thread's current device

const char* intern(const std::string& text);

// Counts one call. Names must be literals or interned.
void count(Kind kind, const char* name, const void* stream = nullptr, size_t bytes = 0, int on = -1);

// Counts a call that makes the host wait (WAIT) or may do so (COPY), and calls Python for the line that caused it.
void block(Kind kind, const char* name, const void* stream = nullptr, size_t bytes = 0);

// The device of a stream; -1 for the default streams, which exist on every device.
int stream_device(const void* stream);
void* new_stream(int priority);
int stream_priority(const void* stream);

}  // namespace standin
