// dispatch_send and dispatch_recv (as wait + pack).
#include <algorithm>
#include <cstring>
#include <limits>
#include <set>
#include <string>

#include "cpu/device.h"
#include "cpu/quantise.h"
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

constexpr uint32_t kNotStaged = std::numeric_limits<uint32_t>::max();

}  // namespace

void CpuDevice::dispatch_send(uint32_t channel_index, const DispatchInput& given) {
  require(channel_index, Stage::kIdle, "dispatch_send");
  DispatchInput input = given;
  input.tokens = counted_tokens(given);
  if (input.tokens > layout_.max_tokens) {
    throw ConfigurationError(
        std::to_string(input.tokens) + " tokens to dispatch, but max_tokens_per_rank is " +
        std::to_string(layout_.max_tokens) + "; raise it on all ranks or send fewer tokens");
  }
  const ScopedTimer timer = time_half(Half::kDispatchSend, channels_[channel_index]);
  Channel& channel = channels_[channel_index];
  if (input.ids_are_64_bit) {
    route<int64_t>(channel, input);
  } else {
    route<int32_t>(channel, input);
  }
  if (options_.quantisation != Quantisation::kNone) quantise(channel, input);
  ++channel.round;
  channel.stage = Stage::kDispatchSent;
  channel.tokens = input.tokens;
  counters_.rounds += 1;
  counters_.tokens += input.tokens;
  // The network first: its transfers run while the own node is served. Each rank starts behind itself, so
  // that not all of them write to the same node at once.
  const uint32_t nodes = topology_.nodes();
  channel.staged_rows.assign(input.tokens, kNotStaged);
  for (uint32_t step = 1; step < nodes; ++step) stage_and_post(channel_index, (node_ + step) % nodes, input);
  offer_to_own_node(channel_index, input);
  if (proxy_ != nullptr) proxy_->help();
}

uint32_t CpuDevice::counted_tokens(const DispatchInput& input) const {
  if (input.token_count == nullptr) return input.tokens;
  const int32_t count = *input.token_count;
  if (count < 0 || static_cast<uint32_t>(count) > input.tokens) {
    throw ConfigurationError("the count of tokens is " + std::to_string(count) + ", but x has " +
                             std::to_string(input.tokens) + " rows; pass a count from 0 to that");
  }
  return static_cast<uint32_t>(count);
}

// Replaces the tokens by their codes and scales.
void CpuDevice::quantise(Channel& channel, DispatchInput& input) const {
  const RowShape& shape = layout_.row;
  channel.codes.resize(size_t{input.tokens} * shape.payload_bytes);
  channel.scales.resize(size_t{input.tokens} * shape.scale_bytes);
  for (size_t token = 0; token < input.tokens; ++token) {
    quantise_row(input.x + token * input.x_stride, shape.payload_bytes, options_.quantisation,
                 channel.codes.data() + token * shape.payload_bytes,
                 channel.scales.data() + token * shape.scale_bytes);
  }
  input.x = channel.codes.data();
  input.x_stride = shape.payload_bytes;
  input.scales = channel.scales.data();
}

// Checks all ids, copies them, and lists the tokens of each destination. A slot whose expert has no owner
// travels as one that the caller dropped, so no other rank needs to know.
template <class Id>
void CpuDevice::route(Channel& channel, const DispatchInput& input) {
  for (auto& tokens : channel.destinations) tokens.clear();
  const uint32_t top_k = layout_.row.top_k;
  channel.ids.resize(size_t{input.tokens} * top_k);
  const Id* ids = static_cast<const Id*>(input.ids);
  uint64_t dropped_slots = 0;
  double dropped_weight = 0;
  const auto add_once = [](std::vector<uint32_t>& tokens, uint32_t token) {
    if (tokens.empty() || tokens.back() != token) tokens.push_back(token);
  };
  for (uint32_t token = 0; token < input.tokens; ++token) {
    for (uint32_t slot = 0; slot < top_k; ++slot) {
      const size_t entry = size_t{token} * top_k + slot;
      const int32_t id = checked_id(ids[entry], token, slot, placement_.experts());
      channel.ids[entry] = id;
      if (id < 0) continue;
      const uint32_t destination = destination_of_expert_[static_cast<uint32_t>(id)];
      if (destination == kNoOwner) {
        channel.ids[entry] = -1;
        ++dropped_slots;
        dropped_weight += input.weights[entry];
        continue;
      }
      add_once(channel.destinations[destination], token);
    }
  }
  if (dropped_slots == 0) return;
  counters_.dropped_slots += dropped_slots;
  counters_.dropped_weight += dropped_weight;
}

// Makes a row of the staging section; they are numbered from its start.
void CpuDevice::stage_row(uint32_t channel_index, uint32_t row, const DispatchInput& input, uint32_t token) {
  std::byte* to = describe_row(channel_index, row, input, token);
  std::memcpy(to + layout_.row.payload_offset(), input.x + token * input.x_stride, layout_.row.payload_bytes);
  uint32_t& staged = channels_[channel_index].staged_rows[token];
  if (staged == kNotStaged) staged = row;
}

// Makes a row of a token that was produced in activations(). Its payload is there already.
void CpuDevice::stage_in_place(uint32_t channel_index, const DispatchInput& input, uint32_t token) {
  const uint32_t row = layout_.own_node_row() + token;
  uint32_t& staged = channels_[channel_index].staged_rows[token];
  if (staged != row) describe_row(channel_index, row, input, token);
  staged = row;
}

// Everything of a row but its payload.
std::byte* CpuDevice::describe_row(uint32_t channel_index, uint32_t row, const DispatchInput& input,
                                   uint32_t token) const {
  const RowShape& shape = layout_.row;
  std::byte* to =
      own_arena() + layout_.outgoing(channel_index, Operation::kDispatch) + row * layout_.dispatch_row();
  std::memcpy(to + RowShape::token_offset(), &token, sizeof token);
  std::memcpy(to + RowShape::ids_offset(), channels_[channel_index].ids.data() + size_t{token} * shape.top_k,
              size_t{4} * shape.top_k);
  std::memcpy(to + shape.weights_offset(), input.weights + size_t{token} * shape.top_k,
              size_t{4} * shape.top_k);
  if (shape.scale_bytes > 0) {
    std::memcpy(to + shape.scales_offset(), input.scales + size_t{token} * shape.scale_bytes,
                shape.scale_bytes);
  }
  return to;
}

void CpuDevice::stage_and_post(uint32_t channel_index, uint32_t node, const DispatchInput& input) {
  const std::vector<uint32_t>& tokens = tokens_for_node(channel_index, node);
  const bool in_place = input.x == activations(channel_index);
  const auto make_rows = [&](uint32_t first, uint32_t count) {
    const bool side_by_side = count > 0 && tokens[first + count - 1] - tokens[first] == count - 1;
    if (in_place && side_by_side) {
      for (uint32_t i = first; i < first + count; ++i) stage_in_place(channel_index, input, tokens[i]);
      return layout_.own_node_row() + tokens[first];
    }
    const uint32_t row = layout_.staged_row(node_, node) + first;
    for (uint32_t i = 0; i < count; ++i) stage_row(channel_index, row + i, input, tokens[first + i]);
    return row;
  };
  post_rows(channel_index, Operation::kDispatch, node, static_cast<uint32_t>(tokens.size()), make_rows);
}

// Tells every rank of the own node which of this rank's rows are for it. A token that goes to another node,
// too, has been staged already; its owners here read that row.
void CpuDevice::offer_to_own_node(uint32_t channel_index, const DispatchInput& input) {
  const Channel& channel = channels_[channel_index];
  const bool in_place = input.x == activations(channel_index);
  uint32_t next = layout_.own_node_row();
  for (uint32_t step = 1; step <= topology_.ranks_per_node; ++step) {
    const uint32_t owner = (index_ + step) % topology_.ranks_per_node;
    auto* list = reinterpret_cast<uint32_t*>(own_arena() + layout_.row_list(channel_index, node_, owner));
    const std::vector<uint32_t>& tokens = tokens_for_owner(channel_index, owner);
    for (size_t i = 0; i < tokens.size(); ++i) {
      const uint32_t token = tokens[i];
      if (channel.staged_rows[token] == kNotStaged) {
        if (in_place) {
          stage_in_place(channel_index, input, token);
        } else {
          stage_row(channel_index, next++, input, token);
        }
      }
      list[i] = channel.staged_rows[token];
    }
    publish_list(channel_index, node_, owner, static_cast<uint32_t>(tokens.size()));
  }
}

void CpuDevice::publish_list(uint32_t channel_index, uint32_t source_node, uint32_t owner, uint32_t rows) {
  const RoundWord flag{channels_[channel_index].round, rows};
  word(arenas_[owner], layout_.dispatch_flag(channel_index, layout_.block(owner, source_node, index_)))
      .store(flag.encode(), std::memory_order_release);
  counters_.peer_rows += rows;
}

bool CpuDevice::dispatch_ready(uint32_t channel_index) {
  require(channel_index, Stage::kDispatchSent, "dispatch_recv");
  // The caller may write into the results next, from which the last round's writes went if there is one rank
  // per node; otherwise into the combine staging.
  if (!receive_sources(channel_index) || !sent(channel_index, Operation::kCombine)) return false;
  Channel& channel = channels_[channel_index];
  channel.received = 0;
  for (Source& source : channel.sources) {
    source.first_row = channel.received;
    channel.received += static_cast<uint32_t>(source.rows.size());
    source.ready = false;
  }
  counters_.received_rows += channel.received;
  channel.stage = Stage::kDispatchReady;
  return true;
}

uint32_t CpuDevice::dispatch_wait(uint32_t channel_index) {
  require(channel_index, Stage::kDispatchSent, "dispatch_recv");
  const ScopedTimer timer = time_half(Half::kDispatchRecv, channels_[channel_index]);
  Channel& channel = channels_[channel_index];
  channel.missing = kNobody;
  wait(
      channel, [&] { return dispatch_ready(channel_index); },
      [&] {
        std::set<uint32_t> missing;
        for (const Source& source : channel.sources) {
          // Rows of other rails come through the rank of this node that shares their rail.
          const bool own_rail = source.holder == index_;
          if (!source.ready) missing.insert(own_rail ? source.rank : topology_.rank_at(node_, source.holder));
        }
        if (missing.empty()) return unfinished_peers();
        return std::vector<uint32_t>(missing.begin(), missing.end());
      });
  return channel.received;
}

// Takes in every source that has arrived since the last call, and offers its rows to the ranks of the own
// node. True when all have.
bool CpuDevice::receive_sources(uint32_t channel_index) {
  Channel& channel = channels_[channel_index];
  bool all = true;
  for (Source& source : channel.sources) {
    if (source.ready) continue;
    const uint32_t source_node = topology_.node_of(source.rank);
    const bool own_rail = source_node != node_ && source.holder == index_;
    const RoundWord arrived = read_word(
        own_rail ? layout_.arrival(channel_index, Operation::kDispatch, source_node)
                 : layout_.dispatch_flag(channel_index, layout_.block(index_, source_node, source.holder)));
    if (arrived.round != channel.round) {
      channel.missing = own_rail ? source.rank : topology_.rank_at(node_, source.holder);
      all = false;
      continue;
    }
    if (arrived.rows > layout_.max_tokens) {
      throw ProtocolError("rank " + std::to_string(source.rank) + " announced " +
                          std::to_string(arrived.rows) + " rows, more than max_tokens_per_rank (" +
                          std::to_string(layout_.max_tokens) +
                          "); its memory was overwritten by a foreign writer");
    }
    if (own_rail) {
      forward(channel_index, source, arrived.rows);
    } else {
      take_list(channel_index, source, arrived.rows);
    }
    source.ready = true;
  }
  return all;
}

// Copies a list that another rank wrote, and checks it: row numbers become addresses.
void CpuDevice::take_list(uint32_t channel_index, Source& source, uint32_t rows) const {
  const uint32_t source_node = topology_.node_of(source.rank);
  const auto* list = reinterpret_cast<const uint32_t*>(arenas_[source.holder] +
                                                       layout_.row_list(channel_index, source_node, index_));
  const uint32_t limit = (source_node == node_ ? topology_.nodes() : 1) * layout_.max_tokens;
  source.rows.assign(list, list + rows);
  for (const uint32_t row : source.rows) {
    if (row < limit) continue;
    throw ProtocolError("rank " + std::to_string(topology_.rank_at(node_, source.holder)) + " lists row " +
                        std::to_string(row) + " of rank " + std::to_string(source.rank) + ", which has " +
                        std::to_string(limit) + "; its memory was overwritten by a foreign writer");
  }
}

// Tells the ranks of the own node which rows of a slot are for them. The rows stay where they are.
void CpuDevice::forward(uint32_t channel_index, Source& source, uint32_t rows) {
  const uint32_t source_node = topology_.node_of(source.rank);
  Channel& channel = channels_[channel_index];
  channel.slot_rows[source_node] = rows;
  source.rows.clear();
  const std::byte* slot = own_arena() + source.section;
  const uint32_t ranks = topology_.ranks_per_node;
  uint32_t* listed = channel.listed.data() + size_t{source_node} * ranks;
  std::fill_n(listed, ranks, 0);
  auto* lists = reinterpret_cast<uint32_t*>(own_arena() + layout_.row_list(channel_index, source_node, 0));
  for (uint32_t row = 0; row < rows; ++row) {
    for (const uint32_t owner : owners_of(ids_of(slot + row * layout_.dispatch_row()))) {
      if (owner == index_) {
        source.rows.push_back(row);
      } else {
        lists[size_t{owner} * layout_.max_tokens + listed[owner]++] = row;
      }
    }
  }
  for (uint32_t owner = 0; owner < ranks; ++owner) {
    if (owner != index_) publish_list(channel_index, source_node, owner, listed[owner]);
  }
}

void CpuDevice::dispatch_pack(uint32_t channel_index, const DispatchOutput& output) {
  require(channel_index, Stage::kDispatchReady, "dispatch_recv");
  const ScopedTimer timer = time_half(Half::kDispatchRecv, channels_[channel_index]);
  std::fill_n(output.tokens_per_expert, local_experts_, 0);
  if (options_.per_expert) {
    pack_per_expert(channel_index, output);
  } else {
    pack_per_token(channel_index, output);
  }
  channels_[channel_index].stage = Stage::kPacked;
}

void CpuDevice::copy_activation(const std::byte* row, const DispatchOutput& output, size_t place,
                                Caching caching) const {
  const RowShape& shape = layout_.row;
  copy_row(output.x + place * shape.payload_bytes, row + shape.payload_offset(), shape.payload_bytes,
           caching);
  if (shape.scale_bytes > 0) {
    std::memcpy(output.scales + place * shape.scale_bytes, row + shape.scales_offset(), shape.scale_bytes);
  }
}

void CpuDevice::pack_per_token(uint32_t channel_index, const DispatchOutput& output) const {
  const uint32_t top_k = layout_.row.top_k;
  const Channel& channel = channels_[channel_index];
  const Caching how = caching(channel.received, layout_.row.payload_bytes);
  size_t place = 0;
  for (const Source& source : channel.sources) {
    for (uint32_t i = 0; i < source.rows.size(); ++i, ++place) {
      const std::byte* row = row_of(source, i);
      copy_activation(row, output, place, how);
      const RowIds ids = ids_of(row);
      std::copy(ids.begin(), ids.end(), output.ids + place * top_k);
      std::memcpy(output.weights + place * top_k, weights_of(row), size_t{4} * top_k);
      for (const int32_t id : ids) {
        if (is_own(id)) ++output.tokens_per_expert[placement_.local(id)];
      }
    }
  }
}

// A token that names an expert twice gets one row there, so an expert never has more than capacity() rows.
void CpuDevice::pack_per_expert(uint32_t channel_index, const DispatchOutput& output) {
  Channel& channel = channels_[channel_index];
  const uint32_t top_k = layout_.row.top_k;
  const Caching how = caching(channel.received, layout_.row.payload_bytes);
  channel.positions.clear();
  for (const Source& source : channel.sources) {
    for (uint32_t i = 0; i < source.rows.size(); ++i) {
      const std::byte* row = row_of(source, i);
      const RowIds ids = ids_of(row);
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
            copy_activation(row, output, size_t{expert} * capacity() + position, how);
          }
        }
        channel.positions.push_back(position);
      }
    }
  }
}

}  // namespace efa_ep
