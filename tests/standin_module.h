// What a module for the stand-in driver tells of its kernels.
#pragma once

#include <cstddef>
#include <utility>

namespace standin {

struct Kernel {
  const char* name;
  unsigned most_threads;
  bool waits;  // has barriers, shuffles, products of matrices or copies
  bool begins; // waits for the launches in front of it before anything else
  int count;
  const std::size_t* sizes;
  void (*run)(void** arguments);
};

template <auto kernel>
struct Entry;

template <class... A, void (*kernel)(A...)>
struct Entry<kernel> {
  static constexpr int count = sizeof...(A);
  static constexpr std::size_t sizes[] = {sizeof(A)..., 0};
  template <std::size_t... I>
  static void call(void** arguments, std::index_sequence<I...>) {
    kernel(*static_cast<A*>(arguments[I])...);
  }
  static void run(void** arguments) { call(arguments, std::index_sequence_for<A...>{}); }
};

}  // namespace standin
