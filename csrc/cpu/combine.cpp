// combine_send and combine_recv.
#include <algorithm>
#include <array>
#include <set>

#include "cpu/device.h"
#include "cpu/timer.h"

namespace efa_ep {

void CpuDevice::combine_send(uint32_t channel_index, const CombineInput& input) {
  require(channel_index, Stage::kPacked, "combine_send");
  const ScopedTimer timer(counters_.half_ns[static_cast<size_t>(Half::kCombineSend)]);
  Channel& channel = channels_[channel_index];
  channel.stage = Stage::kCombineSent;
  channel.summed.assign(topology_.nodes(), false);
  channel.summed[node_] = true;
  if (topology_.nodes() > 1) wait_for_staging(channel_index, Operation::kCombine, Half::kCombineSend);
  uint32_t first_row = 0;
  for (const Source& source : channel.sources) {
    if (source.own_rail) {
      stage_partials(channel_index, source, input, first_row);
    } else {
      write_partials(channel_index, source, input, first_row);
    }
    first_row += source.rows;
  }
  sum_rail(channel_index);
  if (proxy_ != nullptr) proxy_->help();
}

// Rows of the own rail: this rank's share goes straight to where the node's sum will be. With one rank per
// node it is the sum.
void CpuDevice::stage_partials(uint32_t channel_index, const Source& source, const CombineInput& input,
                               uint32_t first_row) {
  const uint32_t node = topology_.node_of(source.rank);
  std::byte* staging = own_arena() + layout_.staging(channel_index, Operation::kCombine, node_, node);
  const auto stage = [&](uint32_t i) {
    reduce_row(staging + source.slot_rows[i] * layout_.combine_row(), channel_index, input,
               row_of(channel_index, source, i), first_row + i);
  };
  if (topology_.ranks_per_node == 1) {
    post_rows(channel_index, Operation::kCombine, node, source.rows, stage);
    channels_[channel_index].summed[node] = true;
    return;
  }
  for (uint32_t i = 0; i < source.rows; ++i) stage(i);
}

// Rows of this rank itself and of other rails: partial sums go to the local rank that shares the source's
// rail.
void CpuDevice::write_partials(uint32_t channel_index, const Source& source, const CombineInput& input,
                               uint32_t first_row) {
  const uint32_t rail = topology_.index_of(source.rank);
  const size_t block = layout_.block(rail, topology_.node_of(source.rank), index_);
  std::byte* partials = arenas_[rail] + layout_.partial(channel_index, block);
  if (!options_.per_expert && !input.per_slot) {
    // Not memcpy: a rank without rows may pass no pointer.
    std::copy_n(input.rows + first_row * layout_.combine_row(), source.rows * layout_.combine_row(),
                partials);
  } else {
    for (uint32_t i = 0; i < source.rows; ++i) {
      reduce_row(partials + i * layout_.combine_row(), channel_index, input, row_of(channel_index, source, i),
                 first_row + i);
    }
  }
  const RoundWord flag{channels_[channel_index].round, source.rows};
  word(arenas_[rail], layout_.partial_flag(channel_index, block))
      .store(flag.encode(), std::memory_order_release);
  counters_.peer_rows += source.rows;
}

// Sums one received row's results over this rank's experts, in slot order.
void CpuDevice::reduce_row(std::byte* to, uint32_t channel_index, const CombineInput& input,
                           const std::byte* dispatched, uint32_t row) const {
  const uint32_t top_k = layout_.row.top_k;
  const size_t bytes = layout_.combine_row();
  std::array<WeightedRow, kMaxTopK> terms;
  size_t count = 0;
  if (!options_.per_expert && !input.per_slot) {
    terms[count++] = {input.rows + row * bytes, 1.0f};
  } else {
    const int32_t* ids = ids_of(dispatched);
    const float* weights = weights_of(dispatched);
    for (uint32_t slot = 0; slot < top_k; ++slot) {
      if (!is_own(ids[slot])) continue;
      const size_t entry = size_t{row} * top_k + slot;
      const size_t place = input.per_slot ? entry
                                          : size_t{placement_.local(ids[slot])} * capacity() +
                                                channels_[channel_index].positions[entry];
      terms[count++] = {input.rows + place * bytes, input.weights_applied ? 1.0f : weights[slot]};
    }
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
      complete = owner == index_ || partials_ready(channel_index, node, owner);
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

bool CpuDevice::partials_ready(uint32_t channel_index, uint32_t source_node, uint32_t owner) const {
  const size_t block = layout_.block(index_, source_node, owner);
  return read_word(layout_.partial_flag(channel_index, block)).round == channels_[channel_index].round;
}

// Partials lie in the order of their owner's rows; which rows those are, the dispatch slot still says.
void CpuDevice::sum_node(uint32_t channel_index, uint32_t node) {
  const Channel& channel = channels_[channel_index];
  const size_t bytes = layout_.combine_row();
  const std::byte* slot = own_arena() + layout_.slot(channel_index, Operation::kDispatch, node_, node);
  std::byte* staging = own_arena() + layout_.staging(channel_index, Operation::kCombine, node_, node);
  std::vector<uint32_t> next(topology_.ranks_per_node, 0);
  post_rows(channel_index, Operation::kCombine, node, channel.slot_rows[node], [&](uint32_t row) {
    std::array<WeightedRow, kMaxTopK> terms;
    size_t count = 0;
    for (const uint32_t owner : owners_of(ids_of(slot + row * layout_.dispatch_row()))) {
      const std::byte* partials =
          own_arena() + layout_.partial(channel_index, layout_.block(index_, node, owner));
      terms[count++].row = owner == index_ ? staging + row * bytes : partials + next[owner]++ * bytes;
    }
    sum_rows(staging + row * bytes, {terms.data(), count}, bytes / scalar_bytes(options_.combine_type),
             options_.combine_type);
  });
}

void CpuDevice::combine_recv(uint32_t channel_index, std::byte* out) {
  require(channel_index, Stage::kCombineSent, "combine_recv");
  const ScopedTimer timer(counters_.half_ns[static_cast<size_t>(Half::kCombineRecv)]);
  Channel& channel = channels_[channel_index];
  const auto arrived = [&](uint32_t node) {
    return read_word(layout_.arrival(channel_index, Operation::kCombine, node)).round == channel.round;
  };
  wait(
      Half::kCombineRecv, channel.round,
      [&] {
        bool all = sum_rail(channel_index);
        for (uint32_t owner = 0; owner < topology_.ranks_per_node && all; ++owner) {
          all = partials_ready(channel_index, node_, owner);
        }
        for (uint32_t node = 0; node < topology_.nodes() && all; ++node) all = node == node_ || arrived(node);
        return all;
      },
      [&] {
        std::set<uint32_t> missing;
        for (uint32_t node = 0; node < topology_.nodes(); ++node) {
          if (node != node_ && !arrived(node)) missing.insert(topology_.rail_peer(options_.rank, node));
          for (uint32_t owner = 0; owner < topology_.ranks_per_node; ++owner) {
            const bool in_slot = owner == index_ && node != node_;
            if (!in_slot && !partials_ready(channel_index, node, owner)) {
              missing.insert(topology_.rank_at(node_, owner));
            }
          }
        }
        return std::vector<uint32_t>(missing.begin(), missing.end());
      });
  gather(channel_index, out);
  channel.stage = Stage::kIdle;
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
      parts.push_back({&channel.tokens_of_node[node],
                       own_arena() + layout_.slot(channel_index, Operation::kCombine, node_, node)});
      continue;
    }
    for (uint32_t owner = 0; owner < topology_.ranks_per_node; ++owner) {
      const size_t block = layout_.block(index_, node_, owner);
      parts.push_back({&channel.tokens_of_owner[owner], own_arena() + layout_.partial(channel_index, block)});
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
