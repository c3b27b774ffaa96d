#include "world_plan.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>

namespace efa_ep {

std::ostream& operator<<(std::ostream& out, const WorldConfig& c) {
  const RowShape& row = c.layout.row;
  out << "TEST_SEED=" << c.seed << ": " << c.layout.topology.nodes() << " nodes x "
      << c.layout.topology.ranks_per_node << " ranks, top_k " << row.top_k << ", payload "
      << row.payload_bytes << " + " << row.scale_bytes << ", combine " << row.combine_bytes << " of type "
      << static_cast<int>(c.combine_type) << ", max_tokens " << c.layout.max_tokens << ", channels "
      << c.layout.channels << (c.thread_per_channel ? " in threads" : "") << ", "
      << (c.per_expert ? "per_expert"
          : c.per_slot ? "per_slot"
                       : "per_token")
      << (c.weights_applied ? "" : ", weights not applied") << (c.in_place ? ", in place" : "")
      << ", cached bytes " << c.cached_bytes << ", ids " << (c.ids_are_64_bit ? 64 : 32) << ", routing "
      << static_cast<int>(c.routing) << ", chunks " << c.chunk_bytes << ", rails " << c.rails << ", ring "
      << c.ring_commands << ", queue " << c.send_queue_depth << (c.proxy_threads ? "" : ", no proxy threads")
      << ", signals " << name_of(c.signal_policy) << ", owners";
  for (const uint32_t owner : c.expert_owner) out << " " << owner;
  return out;
}

std::vector<RankRound> Planner::plan(const Change& change) {
  ranks_.assign(config_.world(), {});
  rows_.assign(config_.world(), {});
  partials_.assign(config_.world(), {});
  for (uint32_t rank = 0; rank < config_.world(); ++rank) {
    draw_tokens(ranks_[rank]);
    if (change) change(rank, ranks_[rank]);
  }
  for (uint32_t owner = 0; owner < config_.world(); ++owner) plan_owner(owner);
  for (uint32_t rank = 0; rank < config_.world(); ++rank) {
    plan_result(rank);
    count_rows(rank);
  }
  return std::move(ranks_);
}

int64_t Planner::id_of(const Token& token, uint32_t slot) const {
  return ranks_[token.first].ids[token.second * layout_.row.top_k + slot];
}

bool Planner::goes_to(const Token& token, uint32_t owner) const {
  for (uint32_t slot = 0; slot < layout_.row.top_k; ++slot) {
    if (owned_by(owner, id_of(token, slot))) return true;
  }
  return false;
}

size_t Planner::local_index(int64_t id) const {
  return static_cast<size_t>(
      std::count(config_.expert_owner.begin(), config_.expert_owner.begin() + id, owner_of(id)));
}

void Planner::draw_tokens(RankRound& rank) {
  const RowShape& row = layout_.row;
  const auto kinds = static_cast<uint32_t>(Routing::kNoTokens);
  const Routing routing =
      config_.routing == Routing::kMixed ? static_cast<Routing>(1 + below(kinds)) : config_.routing;
  rank.tokens = below(3) == 0 ? layout_.max_tokens : below(layout_.max_tokens + 1);
  if (routing == Routing::kNoTokens) rank.tokens = 0;
  const int64_t hot = below(config_.experts());
  for (uint32_t token = 0; token < rank.tokens; ++token) {
    const uint32_t start = below(config_.experts());
    for (uint32_t slot = 0; slot < row.top_k; ++slot) {
      int64_t id = below(config_.experts());
      if (routing == Routing::kDistinct) {
        id = slot < config_.experts() ? static_cast<int64_t>((start + slot) % config_.experts()) : -1;
      }
      if (routing == Routing::kSparse && below(3) != 0) id = -1;
      if (routing == Routing::kRepeated && slot > 0 && below(2) == 0) id = rank.ids.back();
      if (routing == Routing::kOneExpert) id = hot;
      if (routing == Routing::kAllDropped) id = -1;
      rank.ids.push_back(id);
      // All 24 bits of a float: a product that is not rounded by itself differs.
      rank.weights.push_back(static_cast<float>(below(1u << 24)) / (1u << 22) - 1);
    }
  }
  rank.x = random_bytes(size_t{rank.tokens} * row.payload_bytes);
  rank.scales = random_bytes(size_t{rank.tokens} * row.scale_bytes);
}

Bytes Planner::random_bytes(size_t count) {
  Bytes bytes(count);
  for (std::byte& byte : bytes) byte = std::byte(random_());
  return bytes;
}

oracle::Row Planner::random_row() {
  oracle::Row row(elements());
  for (float& number : row) {
    const float magnitude = std::ldexp(static_cast<float>(below(2048)), static_cast<int>(below(16)) - 16);
    number = oracle::decode(config_.combine_type, oracle::encode(config_.combine_type, magnitude));
    if (below(2) == 0) number = -number;
  }
  return row;
}

oracle::Row Planner::answer(RankRound& rank, size_t place) {
  const oracle::Row row = random_row();
  oracle::store(config_.combine_type, row, rank.expert_rows.data() + place * layout_.row.combine_bytes);
  return row;
}

void Planner::plan_owner(uint32_t owner) {
  RankRound& rank = ranks_[owner];
  for (uint32_t source = 0; source < config_.world(); ++source) {
    for (uint32_t token = 0; token < ranks_[source].tokens; ++token) {
      if (goes_to({source, token}, owner)) rows_[owner].emplace_back(source, token);
    }
  }
  rank.rows = static_cast<uint32_t>(rows_[owner].size());
  rank.tokens_per_expert.assign(std::count(config_.expert_owner.begin(), config_.expert_owner.end(), owner),
                                0);
  const uint32_t top_k = layout_.row.top_k;
  const size_t capacity = size_t{config_.world()} * layout_.max_tokens;
  const size_t places = config_.per_expert ? rank.tokens_per_expert.size() * capacity : rank.rows;
  rank.received_x.assign(places * layout_.row.payload_bytes, kUntouched);
  rank.received_scales.assign(places * layout_.row.scale_bytes, kUntouched);
  const size_t answers = config_.per_slot ? places * top_k : places;
  // All ones are a NaN in each of the types: whoever reads a row that has no meaning shows.
  rank.expert_rows.assign(answers * layout_.row.combine_bytes, std::byte{0xFF});
  for (size_t row = 0; row < rows_[owner].size(); ++row) {
    if (config_.per_expert) {
      plan_expert_row(owner, rows_[owner][row], capacity);
    } else {
      plan_token_row(owner, rows_[owner][row], row);
    }
  }
}

void Planner::plan_token_row(uint32_t owner, const Token& token, size_t row) {
  RankRound& rank = ranks_[owner];
  const uint32_t top_k = layout_.row.top_k;
  receive(rank, token, row);
  oracle::Terms terms;
  if (!config_.per_slot) terms.emplace_back(answer(rank, row), 1.0f);
  for (uint32_t slot = 0; slot < top_k; ++slot) {
    const int64_t id = id_of(token, slot);
    const float weight = ranks_[token.first].weights[token.second * top_k + slot];
    rank.received_ids.push_back(static_cast<int32_t>(id));
    rank.received_weights.push_back(weight);
    if (!owned_by(owner, id)) continue;
    ++rank.tokens_per_expert[local_index(id)];
    if (config_.per_slot) {
      terms.emplace_back(answer(rank, row * top_k + slot), config_.weights_applied ? 1.0f : weight);
    }
  }
  partials_[owner][token] = oracle::sum(config_.combine_type, terms, elements());
}

void Planner::plan_expert_row(uint32_t owner, const Token& token, size_t capacity) {
  RankRound& rank = ranks_[owner];
  const uint32_t top_k = layout_.row.top_k;
  oracle::Terms terms;
  std::map<int64_t, oracle::Row> answers;  // by expert
  for (uint32_t slot = 0; slot < top_k; ++slot) {
    const int64_t id = id_of(token, slot);
    if (!owned_by(owner, id)) continue;
    if (!answers.contains(id)) {
      const size_t expert = local_index(id);
      const size_t place = expert * capacity + static_cast<size_t>(rank.tokens_per_expert[expert]++);
      receive(rank, token, place);
      answers[id] = answer(rank, place);
    }
    const float weight = ranks_[token.first].weights[token.second * top_k + slot];
    terms.emplace_back(answers[id], config_.weights_applied ? 1.0f : weight);
  }
  partials_[owner][token] = oracle::sum(config_.combine_type, terms, elements());
}

void Planner::receive(RankRound& rank, const Token& token, size_t place) const {
  const RankRound& source = ranks_[token.first];
  const auto copy = [&](const Bytes& from, Bytes& to, size_t bytes) {
    std::copy_n(from.begin() + token.second * bytes, bytes, to.begin() + place * bytes);
  };
  copy(source.x, rank.received_x, layout_.row.payload_bytes);
  copy(source.scales, rank.received_scales, layout_.row.scale_bytes);
}

void Planner::plan_result(uint32_t rank) {
  RankRound& round = ranks_[rank];
  const size_t bytes = layout_.row.combine_bytes;
  round.out.resize(round.tokens * bytes);
  for (uint32_t token = 0; token < round.tokens; ++token) {
    oracle::Terms result;
    for (uint32_t node = 0; node < topology_.nodes(); ++node) {
      oracle::Terms of_node;
      for (uint32_t index = 0; index < topology_.ranks_per_node; ++index) {
        const auto& partials = partials_[node * topology_.ranks_per_node + index];
        const auto found = partials.find({rank, token});
        if (found != partials.end()) of_node.emplace_back(found->second, 1.0f);
      }
      if (node == node_of(rank)) {
        result.insert(result.end(), of_node.begin(), of_node.end());
      } else if (!of_node.empty()) {
        result.emplace_back(oracle::sum(config_.combine_type, of_node, elements()), 1.0f);
      }
    }
    oracle::store(config_.combine_type, oracle::sum(config_.combine_type, result, elements()),
                  round.out.data() + token * bytes);
  }
}

uint64_t Planner::tokens_to_node(uint32_t source, uint32_t node) const {
  uint64_t count = 0;
  for (uint32_t token = 0; token < ranks_[source].tokens; ++token) {
    bool any = false;
    for (uint32_t index = 0; index < topology_.ranks_per_node; ++index) {
      any |= goes_to({source, token}, node * topology_.ranks_per_node + index);
    }
    count += any;
  }
  return count;
}

uint64_t Planner::rows_from(uint32_t owner, uint32_t source) const {
  return static_cast<uint64_t>(std::count_if(rows_[owner].begin(), rows_[owner].end(),
                                             [&](const Token& token) { return token.first == source; }));
}

void Planner::count_rows(uint32_t rank) {
  RankRound& round = ranks_[rank];
  for (uint32_t source = 0; source < config_.world(); ++source) {
    const bool rail_peer = index_of(source) == index_of(rank) && source != rank;
    if (rail_peer) {  // dispatch there, and node sums back
      round.network_rows += tokens_to_node(rank, node_of(source)) + tokens_to_node(source, node_of(rank));
    } else {  // its partials
      round.peer_rows += rows_from(rank, source);
    }
    const bool from_here = source == rank;
    for (uint32_t owner = 0; owner < config_.world(); ++owner) {
      if (node_of(owner) != node_of(rank)) continue;
      if (from_here || (rail_peer && owner != rank)) round.peer_rows += rows_from(owner, source);
    }
  }
}

void expect_rows(const std::string& name, const Bytes& got, const Bytes& want, size_t row_bytes) {
  ASSERT_EQ(got.size(), want.size());
  const auto [first, other] = std::mismatch(got.begin(), got.end(), want.begin());
  if (first == got.end()) return;
  const auto at = static_cast<size_t>(first - got.begin());
  ADD_FAILURE() << name << ": row " << at / row_bytes << " of " << got.size() / row_bytes
                << " differs first at byte " << at % row_bytes << " of " << row_bytes << ": "
                << static_cast<int>(*first) << " instead of " << static_cast<int>(*other);
}

}  // namespace efa_ep
