// dispatch_send and dispatch_recv (as wait + pack).
#include <algorithm>
#include <cstring>
#include <set>
#include <string>

#include "cpu/device.h"
#include "cpu/timer.h"
#include "errors.h"

namespace efa_ep {
namespace {

template <class Id>
int32_t checked_id(Id id, uint32_t token, uint32_t slot, uint32_t experts) {
  if (id < -1 || id >= static_cast<int64_t>(experts)) {
    throw ConfigurationError("topk_ids[" + std::to_string(token) + ", " + std::to_string(slot) + "] is " +
                             std::to_string(id) + ", but the experts are 0 to " +
                             std::to_string(experts - 1) +
                             " (-1 drops a slot); pass global physical expert ids");
  }
  return static_cast<int32_t>(id);
}

}  // namespace

void CpuDevice::dispatch_send(uint32_t channel_index, const DispatchInput& input) {
  require(channel_index, Stage::kIdle, "dispatch_send");
  if (input.tokens > layout_.max_tokens) {
    throw ConfigurationError(
        std::to_string(input.tokens) + " tokens to dispatch, but max_tokens_per_rank is " +
        std::to_string(layout_.max_tokens) + "; raise it on all ranks or send fewer tokens");
  }
  const ScopedTimer timer(counters_.half_ns[static_cast<size_t>(Half::kDispatchSend)]);
  Channel& channel = channels_[channel_index];
  if (input.ids_are_64_bit) {
    route<int64_t>(channel, input);
  } else {
    route<int32_t>(channel, input);
  }
  ++channel.round;
  channel.stage = Stage::kDispatchSent;
  channel.tokens = input.tokens;
  counters_.rounds += 1;
  counters_.tokens += input.tokens;
  // The network first: its transfers run while the own node is served. Each rank starts behind itself, so
  // that not all of them write to the same node at once.
  const uint32_t nodes = topology_.nodes();
  if (nodes > 1) wait_for_staging(channel_index, Operation::kDispatch, Half::kDispatchSend);
  for (uint32_t step = 1; step < nodes; ++step) stage_and_post(channel_index, (node_ + step) % nodes, input);
  write_own_node(channel_index, input);
  if (proxy_ != nullptr) proxy_->help();
}

// Checks all ids, copies them, and lists the tokens of each remote node and each local owner.
template <class Id>
void CpuDevice::route(Channel& channel, const DispatchInput& input) const {
  for (auto& tokens : channel.tokens_of_node) tokens.clear();
  for (auto& tokens : channel.tokens_of_owner) tokens.clear();
  const uint32_t top_k = layout_.row.top_k;
  channel.ids.resize(size_t{input.tokens} * top_k);
  const Id* ids = static_cast<const Id*>(input.ids);
  const auto add_once = [](std::vector<uint32_t>& tokens, uint32_t token) {
    if (tokens.empty() || tokens.back() != token) tokens.push_back(token);
  };
  for (uint32_t token = 0; token < input.tokens; ++token) {
    for (uint32_t slot = 0; slot < top_k; ++slot) {
      const size_t entry = size_t{token} * top_k + slot;
      const int32_t id = checked_id(ids[entry], token, slot, placement_.experts());
      channel.ids[entry] = id;
      if (id < 0) continue;
      const uint32_t rank = placement_.owner(id);
      const uint32_t node = topology_.node_of(rank);
      add_once(
          node == node_ ? channel.tokens_of_owner[topology_.index_of(rank)] : channel.tokens_of_node[node],
          token);
    }
  }
}

void CpuDevice::write_row(std::byte* to, const Channel& channel, const DispatchInput& input,
                          uint32_t token) const {
  const RowShape& row = layout_.row;
  std::memcpy(to + RowShape::token_offset(), &token, sizeof token);
  std::memcpy(to + RowShape::ids_offset(), channel.ids.data() + size_t{token} * row.top_k,
              size_t{4} * row.top_k);
  std::memcpy(to + row.weights_offset(), input.weights + size_t{token} * row.top_k, size_t{4} * row.top_k);
  std::memcpy(to + row.payload_offset(), input.x + size_t{token} * row.payload_bytes, row.payload_bytes);
  if (row.scale_bytes > 0) {
    std::memcpy(to + row.scales_offset(), input.scales + size_t{token} * row.scale_bytes, row.scale_bytes);
  }
}

void CpuDevice::stage_and_post(uint32_t channel_index, uint32_t node, const DispatchInput& input) {
  const Channel& channel = channels_[channel_index];
  const std::vector<uint32_t>& tokens = channel.tokens_of_node[node];
  std::byte* staging = own_arena() + layout_.staging(channel_index, Operation::kDispatch, node_, node);
  post_rows(
      channel_index, Operation::kDispatch, node, static_cast<uint32_t>(tokens.size()),
      [&](uint32_t row) { write_row(staging + row * layout_.dispatch_row(), channel, input, tokens[row]); });
}

void CpuDevice::write_own_node(uint32_t channel_index, const DispatchInput& input) {
  const Channel& channel = channels_[channel_index];
  for (uint32_t step = 1; step <= topology_.ranks_per_node; ++step) {
    const uint32_t owner = (index_ + step) % topology_.ranks_per_node;
    const std::vector<uint32_t>& tokens = channel.tokens_of_owner[owner];
    const size_t block = layout_.block(owner, node_, index_);
    std::byte* region = arenas_[owner] + layout_.region(channel_index, block);
    for (size_t row = 0; row < tokens.size(); ++row) {
      write_row(region + row * layout_.dispatch_row(), channel, input, tokens[row]);
    }
    const RoundWord flag{channel.round, static_cast<uint32_t>(tokens.size())};
    word(arenas_[owner], layout_.region_flag(channel_index, block))
        .store(flag.encode(), std::memory_order_release);
    counters_.peer_rows += tokens.size();
  }
}

uint32_t CpuDevice::dispatch_wait(uint32_t channel_index) {
  require(channel_index, Stage::kDispatchSent, "dispatch_recv");
  const ScopedTimer timer(counters_.half_ns[static_cast<size_t>(Half::kDispatchRecv)]);
  Channel& channel = channels_[channel_index];
  for (Source& source : channel.sources) source.ready = false;
  wait(
      Half::kDispatchRecv, channel.round, [&] { return receive_sources(channel_index); },
      [&] {
        std::set<uint32_t> missing;
        for (const Source& source : channel.sources) {
          // Rows of other rails come through the rank of this node that shares their rail.
          const bool forwarded = !source.own_rail;
          if (!source.ready) {
            missing.insert(forwarded ? topology_.rank_at(node_, topology_.index_of(source.rank))
                                     : source.rank);
          }
        }
        return std::vector<uint32_t>(missing.begin(), missing.end());
      });
  uint32_t rows = 0;
  for (const Source& source : channel.sources) rows += source.rows;
  counters_.received_rows += rows;
  channel.stage = Stage::kDispatchReady;
  return rows;
}

// Takes in every source that has arrived since the last call, forwarding its rows. True when all have.
bool CpuDevice::receive_sources(uint32_t channel_index) {
  Channel& channel = channels_[channel_index];
  bool all = true;
  for (Source& source : channel.sources) {
    if (source.ready) continue;
    const RoundWord arrived = read_word(
        source.own_rail ? layout_.arrival(channel_index, Operation::kDispatch, topology_.node_of(source.rank))
                        : layout_.region_flag(channel_index, source.block));
    if (arrived.round != channel.round) {
      all = false;
      continue;
    }
    if (arrived.rows > layout_.max_tokens) {
      throw ProtocolError("rank " + std::to_string(source.rank) + " announced " +
                          std::to_string(arrived.rows) + " rows, more than max_tokens_per_rank (" +
                          std::to_string(layout_.max_tokens) + ")");
    }
    source.rows = arrived.rows;
    if (source.own_rail) forward(channel_index, source);
    source.ready = true;
  }
  return all;
}

// Copies the rows of a slot to the other local owners' regions, and notes which of them are for this rank
// itself: those stay where they are.
void CpuDevice::forward(uint32_t channel_index, Source& source) {
  Channel& channel = channels_[channel_index];
  const uint32_t source_node = topology_.node_of(source.rank);
  const uint32_t slot_rows = source.rows;
  channel.slot_rows[source_node] = slot_rows;
  source.slot_rows.clear();
  const std::byte* slot = own_arena() + layout_.slot(channel_index, Operation::kDispatch, node_, source_node);
  std::vector<uint32_t> written(topology_.ranks_per_node, 0);
  for (uint32_t row = 0; row < slot_rows; ++row) {
    const std::byte* from = slot + row * layout_.dispatch_row();
    for (const uint32_t owner : owners_of(ids_of(from))) {
      if (owner == index_) {
        source.slot_rows.push_back(row);
        continue;
      }
      const size_t block = layout_.block(owner, source_node, index_);
      std::byte* region = arenas_[owner] + layout_.region(channel_index, block);
      std::memcpy(region + written[owner]++ * layout_.dispatch_row(), from, layout_.dispatch_row());
    }
  }
  source.rows = static_cast<uint32_t>(source.slot_rows.size());
  for (uint32_t owner = 0; owner < topology_.ranks_per_node; ++owner) {
    if (owner == index_) continue;
    const RoundWord flag{channel.round, written[owner]};
    word(arenas_[owner], layout_.region_flag(channel_index, layout_.block(owner, source_node, index_)))
        .store(flag.encode(), std::memory_order_release);
    counters_.peer_rows += written[owner];
  }
}

// The row-th row that a source sent for this rank's experts.
const std::byte* CpuDevice::row_of(uint32_t channel_index, const Source& source, uint32_t row) const {
  if (!source.own_rail) {
    return own_arena() + layout_.region(channel_index, source.block) + row * layout_.dispatch_row();
  }
  const uint32_t source_node = topology_.node_of(source.rank);
  return own_arena() + layout_.slot(channel_index, Operation::kDispatch, node_, source_node) +
         source.slot_rows[row] * layout_.dispatch_row();
}

void CpuDevice::dispatch_pack(uint32_t channel_index, const DispatchOutput& output) {
  require(channel_index, Stage::kDispatchReady, "dispatch_recv");
  const ScopedTimer timer(counters_.half_ns[static_cast<size_t>(Half::kDispatchRecv)]);
  std::fill_n(output.tokens_per_expert, local_experts_, 0);
  if (options_.per_expert) {
    pack_per_expert(channel_index, output);
  } else {
    pack_per_token(channel_index, output);
  }
  channels_[channel_index].stage = Stage::kPacked;
}

void CpuDevice::copy_activation(const std::byte* row, const DispatchOutput& output, size_t place) const {
  const RowShape& shape = layout_.row;
  std::memcpy(output.x + place * shape.payload_bytes, row + shape.payload_offset(), shape.payload_bytes);
  if (shape.scale_bytes > 0) {
    std::memcpy(output.scales + place * shape.scale_bytes, row + shape.scales_offset(), shape.scale_bytes);
  }
}

void CpuDevice::pack_per_token(uint32_t channel_index, const DispatchOutput& output) const {
  const uint32_t top_k = layout_.row.top_k;
  size_t place = 0;
  for (const Source& source : channels_[channel_index].sources) {
    for (uint32_t i = 0; i < source.rows; ++i, ++place) {
      const std::byte* row = row_of(channel_index, source, i);
      copy_activation(row, output, place);
      std::memcpy(output.ids + place * top_k, ids_of(row), size_t{4} * top_k);
      std::memcpy(output.weights + place * top_k, weights_of(row), size_t{4} * top_k);
      const int32_t* ids = ids_of(row);
      for (uint32_t slot = 0; slot < top_k; ++slot) {
        if (is_own(ids[slot])) ++output.tokens_per_expert[placement_.local(ids[slot])];
      }
    }
  }
}

// A token that names an expert twice gets one row there, so an expert never has more than capacity() rows.
void CpuDevice::pack_per_expert(uint32_t channel_index, const DispatchOutput& output) {
  Channel& channel = channels_[channel_index];
  const uint32_t top_k = layout_.row.top_k;
  channel.positions.clear();
  for (const Source& source : channel.sources) {
    for (uint32_t i = 0; i < source.rows; ++i) {
      const std::byte* row = row_of(channel_index, source, i);
      const int32_t* ids = ids_of(row);
      const size_t first = channel.positions.size();
      for (uint32_t slot = 0; slot < top_k; ++slot) {
        uint32_t position = 0;
        if (is_own(ids[slot])) {
          uint32_t earlier = 0;
          while (earlier < slot && ids[earlier] != ids[slot]) ++earlier;
          if (earlier < slot) {
            position = channel.positions[first + earlier];
          } else {
            const uint32_t expert = placement_.local(ids[slot]);
            position = static_cast<uint32_t>(output.tokens_per_expert[expert]++);
            copy_activation(row, output, size_t{expert} * capacity() + position);
          }
        }
        channel.positions.push_back(position);
      }
    }
  }
}

}  // namespace efa_ep
