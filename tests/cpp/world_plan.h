// What a round must do, recomputed from all ranks' inputs with none of the library's code but its types.
//
// Dispatch. Rank r's token goes to every rank that owns at least one of its experts. An owner gets its rows
// in (source rank, token) order, byte for byte. per_token: with all ids and weights of the token. per_expert:
// each of the owner's experts has its rows in that order; a token that names an expert twice has one row
// there.
//
// Combine. The partial of an owner for a token is its row (per_token), or the sum over the token's slots that
// name its experts, in slot order (per_slot, per_expert), times the slot's weight unless weights are applied.
// The sum of a remote node is the sum of its owners' partials in rank order. The result is the sum over nodes
// in order: of a remote node its sum, of the own node each owner's partial in rank order. Each of the three
// sums is made in float32 and rounded once to the combine type; a single term is a copy; no term is zero.
#pragma once

#include <algorithm>
#include <functional>
#include <limits>
#include <map>
#include <ostream>
#include <random>
#include <utility>
#include <vector>

#include "protocol/layout.h"
#include "proxy/signal_policy.h"
#include "scalar_oracle.h"
#include "test_memory.h"

namespace efa_ep {

/// What a buffer holds where nothing may be written.
inline constexpr std::byte kUntouched{0x5C};

enum class Routing { kMixed, kUniform, kDistinct, kSparse, kRepeated, kOneExpert, kAllDropped, kNoTokens };

struct WorldConfig {
  Layout layout;
  std::vector<uint32_t> expert_owner;
  ScalarType combine_type = ScalarType::kBfloat16;
  bool per_expert = false;
  bool per_slot = false;
  bool weights_applied = true;
  bool ids_are_64_bit = false;
  bool in_place = false;  ///< activations, and results per token, are produced where the device wants them
  size_t cached_bytes = std::numeric_limits<size_t>::max();
  Routing routing = Routing::kMixed;
  uint32_t rounds = 3;
  uint64_t chunk_bytes = 128;
  uint32_t rails = 1;
  uint32_t ring_commands = 4096;
  uint32_t send_queue_depth = 16;
  uint32_t arrival_room = 4096;  // of a completion queue
  bool proxy_threads = true;
  bool thread_per_channel = false;
  SignalPolicyKind signal_policy = SignalPolicyKind::kCounted;
  uint64_t seed = 1;

  uint32_t world() const { return layout.topology.world; }
  size_t experts() const { return expert_owner.size(); }
};

inline std::ostream& operator<<(std::ostream& out, const WorldConfig& c) {
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

/// One rank's part of one round: what goes in, and what must come out.
struct RankRound {
  uint32_t tokens = 0;
  std::vector<int64_t> ids;    // [tokens][top_k]
  std::vector<float> weights;  // [tokens][top_k]
  Bytes x, scales;             // [tokens]

  uint32_t rows = 0;
  Bytes received_x, received_scales;  // [rows] or [experts][capacity]
  std::vector<int32_t> received_ids;  // [rows][top_k], none in the per_expert layout
  std::vector<float> received_weights;
  std::vector<int32_t> tokens_per_expert;

  Bytes expert_rows;  // what this rank's experts answer, in the layout that combine_send takes
  Bytes out;          // [tokens]

  uint64_t network_rows = 0, peer_rows = 0;
};

class Planner {
 public:
  explicit Planner(const WorldConfig& config)
      : config_(config), layout_(config.layout), topology_(layout_.topology), random_(config.seed) {}

  using Change = std::function<void(uint32_t rank, RankRound& round)>;

  /// A round of all ranks, with random inputs that `change` may replace.
  std::vector<RankRound> plan(const Change& change = nullptr) {
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

 private:
  using Token = std::pair<uint32_t, uint32_t>;  // source rank, token

  uint32_t below(uint64_t bound) { return static_cast<uint32_t>(random_() % bound); }
  uint32_t owner_of(int64_t id) const { return config_.expert_owner.at(static_cast<size_t>(id)); }
  uint32_t node_of(uint32_t rank) const { return rank / topology_.ranks_per_node; }
  uint32_t index_of(uint32_t rank) const { return rank % topology_.ranks_per_node; }
  size_t elements() const { return layout_.row.combine_bytes / scalar_bytes(config_.combine_type); }
  int64_t id_of(const Token& token, uint32_t slot) const {
    return ranks_[token.first].ids[token.second * layout_.row.top_k + slot];
  }
  bool owned_by(uint32_t owner, int64_t id) const { return id >= 0 && owner_of(id) == owner; }
  bool goes_to(const Token& token, uint32_t owner) const {
    for (uint32_t slot = 0; slot < layout_.row.top_k; ++slot) {
      if (owned_by(owner, id_of(token, slot))) return true;
    }
    return false;
  }
  size_t local_index(int64_t id) const {
    return static_cast<size_t>(
        std::count(config_.expert_owner.begin(), config_.expert_owner.begin() + id, owner_of(id)));
  }

  void draw_tokens(RankRound& rank) {
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

  Bytes random_bytes(size_t count) {
    Bytes bytes(count);
    for (std::byte& byte : bytes) byte = std::byte(random_());
    return bytes;
  }

  /// Finite numbers that the combine type holds, of magnitudes close enough for sums to round; some are
  /// zeros.
  oracle::Row random_row() {
    oracle::Row row(elements());
    for (float& number : row) {
      const float magnitude = std::ldexp(static_cast<float>(below(2048)), static_cast<int>(below(16)) - 16);
      number = oracle::decode(config_.combine_type, oracle::encode(config_.combine_type, magnitude));
      if (below(2) == 0) number = -number;
    }
    return row;
  }
  /// Stores a row that must be read, at a place of the expert rows.
  oracle::Row answer(RankRound& rank, size_t place) {
    const oracle::Row row = random_row();
    oracle::store(config_.combine_type, row, rank.expert_rows.data() + place * layout_.row.combine_bytes);
    return row;
  }

  void plan_owner(uint32_t owner) {
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

  void plan_token_row(uint32_t owner, const Token& token, size_t row) {
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

  void plan_expert_row(uint32_t owner, const Token& token, size_t capacity) {
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

  void receive(RankRound& rank, const Token& token, size_t place) const {
    const RankRound& source = ranks_[token.first];
    const auto copy = [&](const Bytes& from, Bytes& to, size_t bytes) {
      std::copy_n(from.begin() + token.second * bytes, bytes, to.begin() + place * bytes);
    };
    copy(source.x, rank.received_x, layout_.row.payload_bytes);
    copy(source.scales, rank.received_scales, layout_.row.scale_bytes);
  }

  void plan_result(uint32_t rank) {
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

  /// Tokens of `source` that go to at least one rank of `node`.
  uint64_t tokens_to_node(uint32_t source, uint32_t node) const {
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
  uint64_t rows_from(uint32_t owner, uint32_t source) const {
    return static_cast<uint64_t>(std::count_if(rows_[owner].begin(), rows_[owner].end(),
                                               [&](const Token& token) { return token.first == source; }));
  }

  void count_rows(uint32_t rank) {
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

  const WorldConfig& config_;
  const Layout& layout_;
  const Topology topology_;
  std::mt19937_64 random_;
  std::vector<RankRound> ranks_;
  std::vector<std::vector<Token>> rows_;                // by owner
  std::vector<std::map<Token, oracle::Row>> partials_;  // by owner
};

}  // namespace efa_ep
