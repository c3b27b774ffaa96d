// Runs one of the translated snippets (snippets.py) in a block of 256 threads: 32 bytes in and 32 bytes out
// for each of them, through standard input and output.
#include <array>
#include <cstdio>
#include <cstring>
#include <utility>
#include <vector>

#include "engine/ptx_registry.h"
#include "engine/simt.h"

// The host's side of every snippet.
#define SNIPPET(name) \
  extern "C" void name() {}
#include "snippets.inc"
#undef SNIPPET

namespace {

constexpr uint32_t kThreads = 256;
using Row = std::array<uint64_t, 4>;

simt::ptx::HostKernel find(const char* wanted) {
#define SNIPPET(name) \
  if (std::strcmp(wanted, #name) == 0) return &name;
#include "snippets.inc"
#undef SNIPPET
  simt::die("no snippet %s", wanted);
}

}  // namespace

int main(int, char** arguments) {
  std::vector<Row> in(kThreads);
  std::vector<Row> out(kThreads);
  if (std::fread(in.data(), sizeof(Row), kThreads, stdin) != kThreads) simt::die("too few rows");
  simt::ptx::ParamPack params;
  params.add(in.data());
  params.add(out.data());
  simt::configure({.workers = -1});
  const simt::stream_t stream = simt::stream_create(0);
  simt::launch_raw(stream, dim3(1), dim3(kThreads),
                   simt::ptx::bind(find(arguments[1]), arguments[1], std::move(params), kThreads), "snippet");
  simt::stream_sync(stream);
  return std::fwrite(out.data(), sizeof(Row), kThreads, stdout) == kThreads ? 0 : 1;
}
