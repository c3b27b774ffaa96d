// combine_send and combine_recv.
#include <array>
#include <set>

#include "cpu/device.h"
#include "errors.h"

namespace efa_ep {

void CpuDevice::combine_send(uint32_t channel_index, const CombineInput& input) {
  require(channel_index, Stage::kPacked, "combine_send");
  if (options_.per_expert && input.per_slot) {
    throw ConfigurationError("rows per slot belong to the per_token layout; pass rows per expert");
  }
  const ScopedTimer timer = time_half(Half::kCombineSend, channels_[channel_index]);
  Channel& channel = channels_[channel_index];
  channel.stage = Stage::kCombineSent;
  channel.summed.assign(topology_.nodes(), false);
  channel.summed[node_] = true;
  for (const Source& source : channel.sources) offer_results(channel_index, input, source);
  sum_rail(channel_index);
  if (proxy_ != nullptr) proxy_->help();
}

// Makes one source's results, one row per received row, and tells who needs them: the network if this rank's
// results are its node's sums already, else the local rank that shares the source's rail, which may be this
// one.
void CpuDevice::offer_results(uint32_t channel_index, const CombineInput& input, const Source& source) {
  const auto rows = static_cast<uint32_t>(source.rows.size());
  const bool in_place = !options_.per_expert && !input.per_slot && input.rows == results(channel_index);
  const auto make = [&](uint32_t row) {
    if (!in_place) reduce_row(channel_index, input, source, row);
  };
  const uint32_t node = topology_.node_of(source.rank);
  if (topology_.ranks_per_node == 1 && node != node_) {
    post_rows(channel_index, Operation::kCombine, node, rows, [&](uint32_t first, uint32_t count) {
      for (uint32_t row = first; row < first + count; ++row) make(row);
      return source.first_row + first;
    });
    channels_[channel_index].summed[node] = true;
    return;
  }
  for (uint32_t row = 0; row < rows; ++row) make(row);
  std::byte* rail = arenas_[source.holder];
  const size_t flag = layout_.result_flag(channel_index, layout_.block(source.holder, node, index_));
  if (node == node_ || source.holder != index_) {
    word(rail, flag + sizeof(uint64_t)).store(source.first_row, std::memory_order_relaxed);
    word(rail, flag)
        .store(RoundWord{channels_[channel_index].round, rows}.encode(), std::memory_order_release);
    counters_.peer_rows += rows;
  }
}

// Sums one received row's results over this rank's experts, in slot order.
void CpuDevice::reduce_row(uint32_t channel_index, const CombineInput& input, const Source& source,
                           uint32_t source_row) const {
  const uint32_t top_k = layout_.row.top_k;
  const size_t bytes = layout_.combine_row();
  const size_t row = source.first_row + source_row;
  std::byte* to = results(channel_index) + row * bytes;
  if (!options_.per_expert && !input.per_slot) {
    copy_row(to, input.rows + row * bytes, bytes, caching(channels_[channel_index].received, bytes));
    return;
  }
  const std::byte* dispatched = row_of(source, source_row);
  const RowIds ids = ids_of(dispatched);
  const float* weights = weights_of(dispatched);
  std::array<WeightedRow, kMaxTopK> terms;
  size_t count = 0;
  for (uint32_t slot = 0; slot < top_k; ++slot) {
    if (!is_own(ids[slot])) continue;
    const size_t entry = row * top_k + slot;
    const size_t place = input.per_slot ? entry
                                        : size_t{placement_.local(ids[slot])} * capacity() +
                                              channels_[channel_index].positions[entry];
    terms[count++] = {input.rows + place * bytes, input.weights_applied ? 1.0f : weights[slot]};
  }
  sum_rows(to, {terms.data(), count}, bytes / scalar_bytes(options_.combine_type), options_.combine_type);
}

// Sends the node's sums to every source of the own rail whose partials are all here. True when all have been
// sent.
bool CpuDevice::sum_rail(uint32_t channel_index) {
  Channel& channel = channels_[channel_index];
  bool all = true;
  for (uint32_t node = 0; node < topology_.nodes(); ++node) {
    if (channel.summed[node]) continue;
    bool complete = true;
    for (uint32_t owner = 0; owner < topology_.ranks_per_node && complete; ++owner) {
      complete = owner == index_ || results_offered(channel_index, node, owner);
      if (!complete) channel.missing = topology_.rank_at(node_, owner);
    }
    if (complete) {
      sum_node(channel_index, node);
      channel.summed[node] = true;
    } else {
      all = false;
    }
  }
  return all;
}

bool CpuDevice::results_offered(uint32_t channel_index, uint32_t source_node, uint32_t owner) const {
  const size_t block = layout_.block(index_, source_node, owner);
  return read_word(layout_.result_flag(channel_index, block)).round == channels_[channel_index].round;
}

// The `rows` results that an owner has for this rail's source on `source_node`, in its arena. The place comes
// from another rank, so it is checked.
const std::byte* CpuDevice::results_of(uint32_t channel_index, uint32_t source_node, uint32_t owner,
                                       size_t rows) const {
  const size_t flag = layout_.result_flag(channel_index, layout_.block(index_, source_node, owner));
  const uint64_t first = word(own_arena(), flag + sizeof(uint64_t)).load(std::memory_order_relaxed);
  const RoundWord offered = read_word(flag);
  if (offered.rows != rows || first > capacity() - rows) {
    throw ProtocolError("rank " + std::to_string(topology_.rank_at(node_, owner)) + " offers results " +
                        std::to_string(first) + " to " + std::to_string(first + offered.rows) +
                        " for tokens of rank " +
                        std::to_string(topology_.rail_peer(options_.rank, source_node)) + ", but " +
                        std::to_string(rows) + " rows of at most " + std::to_string(capacity()) +
                        " were sent to it; its memory was overwritten by a foreign writer");
  }
  return arenas_[owner] + layout_.results(channel_index) + first * layout_.combine_row();
}

// Each owner's results lie in the order of its rows; which rows those are, the dispatch slot still says.
// Ranks of the node can write there, so a row that names other owners than when it arrived is an error: from
// there on, results would be summed into other tokens.
void CpuDevice::sum_node(uint32_t channel_index, uint32_t node) {
  const Channel& channel = channels_[channel_index];
  const size_t bytes = layout_.combine_row();
  const uint32_t rows = channel.slot_rows[node];
  const std::byte* slot = own_arena() + layout_.slot(channel_index, Operation::kDispatch, node_, node);
  const uint32_t first = layout_.staged_row(node_, node);
  std::byte* staging =
      own_arena() + layout_.outgoing(channel_index, Operation::kCombine) + size_t{first} * bytes;
  struct Results {
    const std::byte* next;
    size_t left;
  };
  std::vector<Results> offered(topology_.ranks_per_node);
  for (uint32_t owner = 0; owner < topology_.ranks_per_node; ++owner) {
    if (owner == index_) {
      const Source& source = channel.sources[topology_.rail_peer(options_.rank, node)];
      offered[owner] = {results(channel_index) + source.first_row * bytes, source.rows.size()};
    } else {
      const uint32_t listed = channel.listed[size_t{node} * topology_.ranks_per_node + owner];
      offered[owner] = {results_of(channel_index, node, owner, listed), listed};
    }
  }
  const auto refuse_changed = [&] {
    throw ProtocolError("rows of rank " + std::to_string(topology_.rail_peer(options_.rank, node)) +
                        " changed after their arrival; their memory was overwritten by a foreign writer");
  };
  const auto sum_row = [&](uint32_t row) {
    std::array<WeightedRow, kMaxTopK> terms;
    size_t count = 0;
    for (const uint32_t owner : owners_of(ids_of(slot + row * layout_.dispatch_row()))) {
      if (offered[owner].left-- == 0) refuse_changed();
      terms[count++].row = offered[owner].next;
      offered[owner].next += bytes;
    }
    sum_rows(staging + row * bytes, {terms.data(), count}, bytes / scalar_bytes(options_.combine_type),
             options_.combine_type);
  };
  post_rows(channel_index, Operation::kCombine, node, rows, [&](uint32_t chunk_row, uint32_t count) {
    for (uint32_t row = chunk_row; row < chunk_row + count; ++row) sum_row(row);
    return first + chunk_row;
  });
  for (const Results& results : offered) {
    if (results.left > 0) refuse_changed();
  }
}

bool CpuDevice::combine_ready(uint32_t channel_index) {
  require(channel_index, Stage::kCombineSent, "combine_recv");
  // The next round's rows take the place of those that this round's writes came from.
  if (!sum_rail(channel_index) || !sent(channel_index, Operation::kDispatch)) return false;
  Channel& channel = channels_[channel_index];
  for (uint32_t owner = 0; owner < topology_.ranks_per_node; ++owner) {
    if (results_offered(channel_index, node_, owner)) continue;
    channel.missing = topology_.rank_at(node_, owner);
    return false;
  }
  for (uint32_t node = 0; node < topology_.nodes(); ++node) {
    if (node == node_ || sums_arrived(channel_index, node)) continue;
    channel.missing = topology_.rail_peer(options_.rank, node);
    return false;
  }
  return true;
}

// The number of sums comes from another rank, so it is checked: fewer would leave those of an earlier round.
bool CpuDevice::sums_arrived(uint32_t channel_index, uint32_t node) const {
  const Channel& channel = channels_[channel_index];
  const RoundWord arrived = read_word(layout_.arrival(channel_index, Operation::kCombine, node));
  if (arrived.round != channel.round) return false;
  const size_t sent = tokens_for_node(channel_index, node).size();
  if (arrived.rows != sent) {
    throw ProtocolError("rank " + std::to_string(topology_.rail_peer(options_.rank, node)) +
                        " announced results for " + std::to_string(arrived.rows) + " tokens, but " +
                        std::to_string(sent) +
                        " were sent to it; its memory was overwritten by a foreign writer");
  }
  return true;
}

void CpuDevice::combine_recv(uint32_t channel_index, std::byte* out) {
  require(channel_index, Stage::kCombineSent, "combine_recv");
  ScopedTimer timer = time_half(Half::kCombineRecv, channels_[channel_index]);
  Channel& channel = channels_[channel_index];
  channel.missing = kNobody;
  wait(
      channel, [&] { return combine_ready(channel_index); },
      [&] {
        std::set<uint32_t> missing;
        for (uint32_t node = 0; node < topology_.nodes(); ++node) {
          if (node != node_ && !sums_arrived(channel_index, node)) {
            missing.insert(topology_.rail_peer(options_.rank, node));
          }
          for (uint32_t owner = 0; owner < topology_.ranks_per_node; ++owner) {
            const bool own_rail = owner == index_ && node != node_;
            if (!own_rail && !results_offered(channel_index, node, owner)) {
              missing.insert(topology_.rank_at(node_, owner));
            }
          }
        }
        if (missing.empty()) return unfinished_peers();
        return std::vector<uint32_t>(missing.begin(), missing.end());
      });
  gather(channel_index, out);
  channel.stage = Stage::kIdle;
  timer.stop();
  record_round(channel);
}

// Sums each token's rows: nodes in ascending order, and within the own node its owners in ascending order.
void CpuDevice::gather(uint32_t channel_index, std::byte* out) const {
  const Channel& channel = channels_[channel_index];
  const size_t bytes = layout_.combine_row();
  struct Part {
    const std::vector<uint32_t>* tokens;
    const std::byte* rows;
    size_t next = 0;
  };
  std::vector<Part> parts;
  for (uint32_t node = 0; node < topology_.nodes(); ++node) {
    if (node != node_) {
      parts.push_back({&tokens_for_node(channel_index, node),
                       own_arena() + layout_.slot(channel_index, Operation::kCombine, node_, node)});
      continue;
    }
    for (uint32_t owner = 0; owner < topology_.ranks_per_node; ++owner) {
      const std::vector<uint32_t>& tokens = tokens_for_owner(channel_index, owner);
      parts.push_back({&tokens, results_of(channel_index, node_, owner, tokens.size())});
    }
  }
  for (uint32_t token = 0; token < channel.tokens; ++token) {
    std::array<WeightedRow, kMaxTopK> terms;
    size_t count = 0;
    for (Part& part : parts) {
      if (part.next == part.tokens->size() || (*part.tokens)[part.next] != token) continue;
      terms[count++].row = part.rows + part.next++ * bytes;
    }
    sum_rows(out + token * bytes, {terms.data(), count}, bytes / scalar_bytes(options_.combine_type),
             options_.combine_type);
  }
}

}  // namespace efa_ep
