#include "proxy/arriving_pairs.h"

#include <string>

#include "errors.h"
#include "protocol/chunking.h"
#include "protocol/tile_immediate.h"

namespace efa_ep {

ArrivingPairs::ArrivingPairs(const Layout& layout, uint32_t node, uint64_t chunk_bytes, uint32_t rails)
    : layout_(layout),
      node_(node),
      chunk_bytes_(chunk_bytes),
      rails_(rails),
      pairs_(size_t{layout.channels} * kOperations * layout.topology.nodes()) {}

ArrivingPairs::Chunk ArrivingPairs::take(uint32_t bits) {
  const Immediate immediate = Immediate::decode(bits);
  const auto refuse = [&](const std::string& why) {
    throw ProtocolError("an arriving write's immediate " + std::to_string(bits) + " " + why +
                        "; a process that is not part of this run, or of an earlier one, writes here");
  };
  if (TileImmediate::is_one(bits)) refuse("is of a tile put, which this rank does not expect");
  if (immediate.channel >= layout_.channels) refuse("names channel " + std::to_string(immediate.channel));
  if (immediate.source_node >= layout_.topology.nodes() || immediate.source_node == node_) {
    refuse("names source node " + std::to_string(immediate.source_node));
  }
  Pair& pair = pair_of(immediate);
  if (immediate.round_tag != pair.round % Immediate::kRoundPeriod) {
    refuse("carries round tag " + std::to_string(immediate.round_tag) + " in round " +
           std::to_string(pair.round));
  }
  if (immediate.first) {
    if (pair.rows_known) refuse("repeats a first chunk");
    if (immediate.value > layout_.max_tokens) {
      refuse("announces " + std::to_string(immediate.value) + " rows");
    }
    pair.rows_known = true;
    pair.rows = immediate.value;
    pair.chunks =
        Chunking::of(pair.rows, layout_.row_bytes(immediate.operation), chunk_bytes_, rails_).chunks;
  }
  ++pair.chunks_seen;
  if (pair.rows_known && pair.chunks_seen > pair.chunks) refuse("is one more chunk than announced");
  const Chunk chunk{.immediate = immediate,
                    .word = {pair.round, pair.rows},
                    .completes_pair = pair.rows_known && pair.chunks_seen == pair.chunks};
  if (chunk.completes_pair) pair = Pair{.round = pair.round + 1};
  return chunk;
}

ArrivingPairs::Pair& ArrivingPairs::pair_of(const Immediate& immediate) {
  const uint32_t row = immediate.channel * kOperations + static_cast<uint32_t>(immediate.operation);
  return pairs_[size_t{row} * layout_.topology.nodes() + immediate.source_node];
}

}  // namespace efa_ep
