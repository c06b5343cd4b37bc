"""Planted defects of verification and sampling, and harmless rewritings of the same lines.

Each entry replaces one expression of the shipped sources, or several. The expression is quoted with as much
around it as makes it unique in its file; « and » enclose the part that is replaced where that is not all of
it. One build holds them all: see build.py. A defect must be noticed by the checks of checks.py, a rewriting
must not.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Edit:
    file: str  # below csrc
    original: str
    mutated: str


@dataclass(frozen=True, slots=True)
class Mutant:
    name: str
    why: str
    edits: tuple[Edit, ...]
    equivalent: bool = False


def defect(name: str, why: str, *edits: tuple[str, str, str]) -> Mutant:
    return Mutant(name, why, tuple(Edit(*edit) for edit in edits))


def equivalent(name: str, why: str, *edits: tuple[str, str, str]) -> Mutant:
    return Mutant(name, why, tuple(Edit(*edit) for edit in edits), equivalent=True)


ACCEPTANCE = "math/acceptance.hpp"
WALKS = "math/tree_walk.hpp"
TREE = "math/tree_index.hpp"
CHOICE = "ops/walk.hpp"
VERIFY = "cpu/verify.cpp"
ROWS = "cpu/tree_rows.cpp"
PATHS = "cpu/first_path.hpp"
INTERVAL = "math/path_interval.hpp"
RESIDUAL = "cpu/residual.cpp"
LAWS = "cpu/draft_laws.cpp"
LOGITS = "cpu/rows.cpp"
FILTERS = "cpu/filters.cpp"
EDITS = "cpu/processing.cpp"
PENALTIES = "ops/logit_edits.hpp"
SAMPLE = "cpu/sampling.cpp"
GUMBEL = "math/gumbel.hpp"

TOKEN_TEST = "static_cast<double>(coin) * kCoinUnit * draft_prob < target_prob"
GAIN = "«state.rest / (weight * state.left)»"
CLOSING_BITS = "«random_bits(coins.seed, coins.base, Purpose::close, static_cast<uint32_t>(verdict.node))»"
BONUS_ROW = "if (verdict.closing == Closing::bonus) return «whole(verdict.node)»;"
DRAFT_BITS = "«random_bits(seed, base, args.purpose, step)»"
TOP_P_CUT = (
    "cut = std::max(cut, «cut == -kInfinity ? top_p_cut(row, whole, processing.top_p, summary, scratch)\n"
    "                                          : top_p_cut(whole, processing.top_p, scratch)»);"
)

DECISIONS = [
    defect("token coin may equal", "a coin of 0 accepts what the target forbids (sglang 35771)",
           (ACCEPTANCE, TOKEN_TEST, TOKEN_TEST.replace(" < ", " <= "))),
    defect("block coin may equal", "the same in the other test",
           (ACCEPTANCE, "static_cast<double>(coin) * kCoinUnit < fraction",
            "static_cast<double>(coin) * kCoinUnit <= fraction")),
    defect("ratio in bfloat16", "drafts drawn in float32 are judged by rounded numbers (DeepSpec 31)",
           (ACCEPTANCE, TOKEN_TEST, "static_cast<double>(coin) * kCoinUnit * to_bfloat(draft_prob) < "
                                    "to_bfloat(target_prob)")),
    defect("coin in float32", "its largest 128 values become 1, and refuse what both laws agree on",
           (ACCEPTANCE, TOKEN_TEST, "static_cast<double>(static_cast<float>(coin) * 0x1p-32f) * draft_prob "
                                    "< target_prob")),
    equivalent("target scaled instead of coin", "by a power of two",
               (ACCEPTANCE, TOKEN_TEST, "static_cast<double>(coin) * draft_prob < target_prob * "
                                        "4294967296.0")),
    defect("prefix not clipped", "a path may count for more than certain",
           (ACCEPTANCE, "«product >= draft_prob ? 1.0 : product / draft_prob»", "product / draft_prob")),
    equivalent("prefix clipped above 1 alone", "equal numbers have the quotient 1",
               (ACCEPTANCE, "«product >= draft_prob ? 1.0 : product / draft_prob»",
                "product > draft_prob ? 1.0 : product / draft_prob")),
    defect("block fraction over S + 1", "the denominator forgets what was kept already",
           (ACCEPTANCE, "«residual + (1.0 - prefix)»", "residual + 1.0")),
    defect("gain in the wrong weights", "the two masses are swapped",
           (ACCEPTANCE, "static_cast<double>(target_mass) / static_cast<double>(draft_mass)",
            "static_cast<double>(draft_mass) / static_cast<double>(target_mass)")),
]  # fmt: skip

WALK = [
    defect("duplicates accepted twice", "a rejected deterministic sibling comes again and is tested anew",
           (WALKS, "return «rows.removed(row, state.rejected, child)» || !(state.rest > 0.0)", "false")),
    defect("gain forgotten in the test", "later siblings meet the target's whole probability",
           (WALKS, "«target - state.gain * rows.draft_prob(row, child)»", "target")),
    defect("rest forgotten in the test", "what is left of the target is not renormalised",
           (WALKS, "«left / state.rest»", "left")),
    defect("draft not renormalised", "a sibling was removed, and the law for the next one is as before",
           (WALKS, "«rows.draft_prob(row, child) / state.left»", "rows.draft_prob(row, child)")),
    defect("removed twice", "a repeated deterministic sibling takes its mass from the rest again",
           (WALKS, "if («!rows.removed(row, elders, child)») state.rest", "true")),
    equivalent("rest below zero kept", "it is not positive either way",
               (WALKS, "if («state.rest < 0.0») state.rest = 0.0;", "false")),
    defect("factor P forgotten", "the residual is [p - q]+ where it has to be [P p - q]+",
           (WALKS, GAIN, "state.rest / state.left")),
    defect("gain not accumulated", "the second rejected sibling replaces the first",
           (WALKS, GAIN, "state.rest / (weight * state.left) - state.gain")),
    defect("rest not updated", "the residual's mass stays that of the row",
           (WALKS, "if («wanted») state.rest = rows.residual", "false")),
    equivalent("rest always computed", "also where nobody reads it",
               (WALKS, "if («wanted») state.rest = rows.residual", "true")),
    defect("removed sibling left in the draft", "its share is not taken out of the draft's law",
           (WALKS, "if («replaces_left») state.left = rows.left", "false")),
    defect("mass of the residual without P", "the rest's share is not multiplied by the path's weight",
           (WALKS, "«weight * state.rest / before»", "state.rest / before")),
    equivalent("division before multiplication", "the same up to a unit in the last place",
               (WALKS, "«weight * state.rest / before»", "weight * (state.rest / before)")),
    defect("residual is the target", "a recovery is drawn from the whole row",
           (WALKS, "«state.rejected > 0 ? Closing::recovery : Closing::bonus»", "Closing::bonus")),
    defect("spectr counts one sibling less", "the equation for rho is that of k - 1",
           (WALKS, "for (int32_t i = 0; «i < siblings»; ++i) all_missed", "i + 1 < siblings")),
    defect("spectr with rho 1", "every sibling claims its full overlap",
           (WALKS, "const double rho = «transport_ratio(rows, node, children_of(tree, node))»;", "1.0")),
    defect("spectr with rho k", "no sibling claims enough",
           (WALKS, "const double rho = «transport_ratio(rows, node, children_of(tree, node))»;",
            "static_cast<double>(children_of(tree, node))")),
    defect("spectr closes from [p - q]+", "rho is left out of the residual",
           (WALKS, "state.gain = «rho»;", "1.0")),
    equivalent("rho by bisection", "64 halvings reach the last bit too",
               (WALKS, "«low + (high - low) * (at_low / (at_low - at_high))»", "0.5 * (low + high)")),
    defect("leaf tested like an inner node", "its h is S / (S + 1 - P) in place of P",
           (WALKS, "if (decide.fraction(node, «states[node].prefix»)) return node;",
            "tree.first_child[node] == kNoNode ? block_fraction(states[node].prefix, 1.0) : "
            "states[node].prefix")),
    defect("inner node tested like a leaf", "its h is P in place of S / (S + 1 - P)",
           (WALKS, "state.prefix = «block_fraction(state.prefix, residual)»;", "state.prefix")),
    equivalent("top tested too", "a prefix of 1 has h = 1",
               (WALKS, "if (wanted && «parent != top»)", "true")),
    equivalent("no short cut for certain prefixes", "they are computed, and stay 1",
               (WALKS, "last && «(parent == top || state.prefix == 1.0)»;", "parent == top")),
    defect("short cut too short", "nodes are given up whose coin would have kept them",
           (WALKS, "decide.may_pass(parent, «1.001 * state.prefix»)", "0.5 * state.prefix")),
    equivalent("short cut longer", "more is computed that changes nothing",
               (WALKS, "decide.may_pass(parent, «1.001 * state.prefix»)", "2.0 * state.prefix")),
    defect("leaves visited from the last child", "traversal takes the siblings in the wrong order",
           (WALKS, "next[below] = «tree.first_child[below]»;",
            "[&] { int16_t last = tree.first_child[below]; while (last != kNoNode && "
            "tree.next_sibling[last] != "
            "kNoNode) last = tree.next_sibling[last]; return last; }()"),
           (WALKS, "next[parent] = «tree.next_sibling[node]»;",
            "[&] { int16_t before = kNoNode; for (int16_t at = tree.first_child[parent]; at != node; at = "
            "tree.next_sibling[at]) before = at; return before; }()")),
    defect("siblings in reverse", "they are tried against the order they were drawn in",
           (TREE,
            "«tree.next_sibling[node] = tree.first_child[parent];\n"
            "    tree.first_child[parent] = static_cast<int16_t>(node);»",
            "int16_t* end = &tree.first_child[parent]; while (*end != kNoNode) end = "
            "&tree.next_sibling[*end]; "
            "*end = static_cast<int16_t>(node);")),
    defect("auto climbs anywhere", "from the leaves up where that is known to keep less",
           (TREE, "(«!without_replacement && fits_into(tree, child, younger)»);", "true")),
    defect("target_only reads laws", "it accepts more than it promises to need",
           (CHOICE, "if («options.rule == Rule::target_only») rows.ignore_draft_laws();", "false"),
           (ROWS, "const bool reads_laws = «rule != Rule::target_only && rule != Rule::coupled»;",
            "rule != Rule::coupled")),
    equivalent("greedy rows by every walk", "all of them keep what is the argmax",
               (CHOICE, "if («rows.greedy()»)\n    return walk_siblings",
                "rows.greedy() && options.rule >= Rule::lossy_typical")),
    defect("threshold coin thrown anew", "an elder sibling's chance is not taken out",
           ("math/lossy_walk.hpp", "«(chance - passed) / (1.0 - passed)»", "chance")),
    defect("typical: the larger bound", "min and max are swapped",
           (ACCEPTANCE, "(«epsilon < typical ? epsilon : typical»)", "epsilon < typical ? typical : "
                                                                     "epsilon")),
]  # fmt: skip

RANDOMNESS = [
    defect("one coin for all nodes", "positions of a round share a number",
           (VERIFY, "return accepts_token(«random_coin(seed, base, static_cast<uint32_t>(node))», "
                    "target_prob",
            "random_coin(seed, base, 1)"),
           (VERIFY, "return accepts_fraction(«random_coin(seed, base, static_cast<uint32_t>(node))», h)",
            "random_coin(seed, base, 1)")),
    defect("coins keyed by position", "a position drafted again gets the coin it had (the block rule's TV "
                                      "0.019)",
           (VERIFY, "return accepts_token(«random_coin(seed, base, static_cast<uint32_t>(node))», "
                    "target_prob",
            "random_coin(seed, base + static_cast<uint64_t>(node), 0)"),
           (VERIFY, "return accepts_fraction(«random_coin(seed, base, static_cast<uint32_t>(node))», h)",
            "random_coin(seed, base + static_cast<uint64_t>(node), 0)")),
    defect("coin reused for closing", "the number that rejected a draft also draws the recovery "
                                      "(vllm-ascend 16370)",
           (VERIFY, CLOSING_BITS,
            "static_cast<uint64_t>(random_coin(coins.seed, coins.base, static_cast<uint32_t>(verdict.node) "
            "+ 1)) "
            "<< 32")),
    defect("draft and recovery share noise", "the number that drew the rejected draft (vllm 54282)",
           (VERIFY, CLOSING_BITS,
            "random_bits(coins.seed, coins.base, Purpose::draft, static_cast<uint32_t>(verdict.node))")),
    defect("closing draw of 32 bits", "rare tokens become impossible",
           (VERIFY, CLOSING_BITS,
            "random_bits(coins.seed, coins.base, Purpose::close, static_cast<uint32_t>(verdict.node)) >> "
            "32 << 32")),
    defect("drafts keyed by position", "a position drafted again gets the draft it had (TV 0.039)",
           (SAMPLE, DRAFT_BITS, "random_bits(seed, base + step, args.purpose, 0)")),
    defect("drafts of a round share their number", "the step is not part of the key",
           (SAMPLE, DRAFT_BITS, "random_bits(seed, base, args.purpose, 0)")),
    defect("purposes share their numbers", "a draft is drawn by the number of a plain token",
           (SAMPLE, DRAFT_BITS, "random_bits(seed, base, Purpose::plain, step)")),
    defect("base off by one", "the round's numbers are those of the next",
           (VERIFY, "args.sampling.seed[slot], «static_cast<uint64_t>(read_index(args.base, b))»};",
            "static_cast<uint64_t>(read_index(args.base, b)) + 1")),
    defect("seed of the row", "the slot is not used",
           (VERIFY, "PhiloxCoins coins{«args.sampling.seed[slot]»,", "args.sampling.seed[b % "
                                                                     "args.sampling.size]")),
    defect("seed of the row when sampling", "the slot is not used",
           (SAMPLE, "const uint64_t seed = «args.sampling.seed[slot]»,", "args.sampling.seed[b % "
                                                                         "args.sampling.size]")),
    defect("coupled noise keyed by node", "the same in a chain, another number in a tree",
           (VERIFY, "base + «static_cast<uint64_t>(rows.tree().depth[node])»;",
            "static_cast<uint64_t>(node)")),
    defect("gumbel draw keyed by round", "the step is not part of the position",
           (SAMPLE, "gumbel_draw(row, law, seed, «base + step», args.vocab_map)", "base")),
    defect("gumbel noise of 32 bits", "two tokens may tie, and rare ones never win",
           (GUMBEL, "return «static_cast<uint64_t>(words.word[high]) << 32 | words.word[high - 1]»;",
            "static_cast<uint64_t>(words.word[high]) << 32")),
    defect("neighbours share noise", "two tokens finish together",
           (GUMBEL, "«token % 2 == 0 ? 1 : 3»", "1")),
    equivalent("later losers looked at", "the bound that spares logarithms is four times wider",
               ("cpu/gumbel.cpp", "race_exponential(uniform) / weight * «1.00001»;", "4.0")),
]  # fmt: skip

ROWS_AND_LAWS = [
    defect("bonus row off by one", "the bonus comes from the row before",
           (ROWS, BONUS_ROW, "whole(verdict.node > 0 ? verdict.node - 1 : 0)")),
    defect("bonus drawn by the drafter", "from its last row, which is at hand",
           (ROWS, BONUS_ROW,
            "[&] { const int32_t last = verdict.node > 0 ? tree_.parent[verdict.node] : 0; "
            "if (!dense(last) || tree_.first_child[last] == kNoNode) return whole(verdict.node); "
            "const DraftLaw& law = draft_law(last); "
            "const bool drawable = law.row.data != nullptr && law.law.kind == LawKind::logits; "
            "return drawable ? whole_of(law.row, law.law, nullptr) : whole(verdict.node); }()")),
    defect("rows of the parent", "a node is judged by the row that its parent was",
           (ROWS, ": «offset_of(logits, batch_row_, node)»);",
            "offset_of(logits, batch_row_, node > 0 ? tree_.parent[node] : 0)")),
    defect("bitmask of the parent", "the grammar is one token late (vllm 44292)",
           (ROWS, ": «offset_of(mask, batch_row_, node)»);",
            "offset_of(mask, batch_row_, node > 0 ? tree_.parent[node] : 0)")),
    defect("penalties forget the drafted path", "the target's rows know what was committed alone",
           (ROWS, "edits_.edit(raw, «edits_.any() ? path_tokens(node) : std::vector<int64_t>{}»,",
            "std::vector<int64_t>{}")),
    defect("drafter's penalties forget the path", "the law declared is not the law drawn",
           (ROWS, "const auto path = «edits.any() ? path_tokens(node) : std::vector<int64_t>{}»;",
            "std::vector<int64_t>{}")),
    defect("draft row ignored", "law rows are taken by node number",
           (ROWS, "const int64_t row = «read_index(args_.draft_row, batch_row_, node)»;", "int64_t{node}")),
    defect("removed siblings off by one", "the last rejected one is not excluded",
           (ROWS, "for (int32_t i = 0; «i < count»; ++i, elder = tree_.next_sibling[elder]) {", "i + 1 < "
                                                                                                "count")),
    defect("draft filters forgotten", "the target's side alone is filtered",
           (ROWS, "draft_processing_(«processing_of(args.draft_sampling, slot)»),", "Processing{}")),
    defect("target filters forgotten", "the drafter's side alone is filtered",
           (ROWS, "      processing_(«processing_of(args.sampling, slot)»),",
            "Processing{args.sampling.temperature[slot]}")),
    defect("filters of the row", "the slot is not used",
           (ROWS, "      processing_(«processing_of(args.sampling, slot)»),",
            "processing_of(args.sampling, b % args.sampling.size)")),
    defect("history one short", "the root is not part of the committed text",
           (ROWS, "      edits_(args.sampling, slot, args.history, «read_index(args.base, b)», vocab_,",
            "read_index(args.base, b) - 1")),
    defect("removed tokens not excluded", "a deterministic draft that was rejected closes the round",
           (ROWS, "for (int64_t token : first_tokens(verdict.node, verdict.state.rejected)) "
                  "«residual.exclude(token);»", "")),
    defect("residual of another gain", "masses that were summed before the last rejection draw the recovery",
           (ROWS, "const bool known = «residual_.node == node && residual_.gain == gain»;",
            "residual_.node == node")),
    equivalent("laws made every time", "they are the same each time",
               (ROWS, "if («target_made_[index]») return;", "false")),
    equivalent("draws never by estimate", "the exact masses decide as the estimate does",
               (RESIDUAL, "if («estimate(residual, masses, slack)») {", "false")),
    defect("token excluded twice", "a repeated rejected sibling counts twice in what is left",
           (RESIDUAL, "«edits.erase(std::unique(edits.begin(), edits.end(), same), edits.end());»", "")),
    defect("intervals for n - 1 paths", "the law of being first is that of fewer paths",
           (INTERVAL, "for (int32_t i = 0; «i < paths»; ++i)", "i + 1 < paths")),
    defect("paths ranked by the drafter", "the target has no say",
           (PATHS, "ratio[id] = «target[id] / static_cast<double>(draft[id])»;",
            "static_cast<double>(draft[id])")),
    defect("rank order reversed", "lossless still, and the worst path is kept",
           (PATHS, "return «ratio[static_cast<size_t>(a)] < ratio[static_cast<size_t>(b)]»;",
            "ratio[static_cast<size_t>(a)] > ratio[static_cast<size_t>(b)]")),
    defect("last path kept", "with the law of the first",
           (PATHS, "if («ranked.place(rows.token(child)) > ranked.place(best)»)",
            "ranked.place(rows.token(child)) < ranked.place(best)")),
    defect("intervals not narrowed", "every level starts from [0, 1) again",
           (PATHS, "«at = ranked.narrowed(at, best);»", "")),
    defect("vocabulary map of a greedy drafter forgotten", "its argmax is a column, not an id",
           (LAWS, "if (result.law.top >= 0) result.law.top = «read_index(args.vocab_map, result.law.top)»;",
            "result.law.top")),
    defect("vocabulary map ignored", "columns are taken for ids",
           (LAWS, "float& place = ordered[static_cast<size_t>(«id»)];", "element < vocab ? element : id")),
    defect("record of the first row", "all nodes are said to be drawn from it",
           (LAWS, "static_cast<const int64_t*>(records.data) + «offset_of(records, b, law_row)»;",
            "offset_of(records, b, 0)")),
    defect("law recorded is not the law drawn", "the record says nothing of the filters",
           (SAMPLE, "note_law(args, b, «law»);\n  if (!law.usable)", "law_of_logits(row, Processing{})")),
]  # fmt: skip

PROCESSING = [
    defect("temperature upside down", "multiplied where it divides",
           ("math/row_law.hpp", "const double scale = «kLog2E / static_cast<double>(temperature)»;",
            "kLog2E * static_cast<double>(temperature)")),
    defect("mass of what was filtered", "the kept tokens are not renormalised",
           (LOGITS, "«law.cut > floor» ? tiles.sum(index)", "false")),
    defect("argmax takes the last of ties", "the lowest id is promised",
           (LOGITS, "if («high > best») {", "high >= best"),
           (LOGITS, "(«std::find(x, x + kTile, best) - x»)",
            "kTile - 1 - (std::find(std::make_reverse_iterator(x + kTile), std::make_reverse_iterator(x), "
            "best) - "
            "std::make_reverse_iterator(x + kTile))")),
    defect("top-p without the crossing token", "the kept mass stays below the bound",
           (FILTERS, TOP_P_CUT,
            "std::min(law.max, std::nextafter(cut == -kInfinity ? top_p_cut(row, whole, processing.top_p, "
            "summary, "
            "scratch) : top_p_cut(whole, processing.top_p, scratch), kInfinity))")),
    defect("top-p before top-k", "its share is that of the whole row",
           (FILTERS, TOP_P_CUT,
            "[&] { RowLaw all = law; all.cut = floor; "
            "return top_p_cut(row, all, processing.top_p, summary, scratch); }()")),
    defect("top-k drops ties", "with the last of the k all its equals go",
           (FILTERS, "cut = «top_k_cut(row, law, floor, summary, processing.top_k, scratch)»;",
            "[&] { const float last = top_k_cut(row, law, floor, summary, processing.top_k, scratch); "
            "int64_t kept = 0; "
            "for (int64_t id = 0; id < row.size; ++id) kept += row.at(id) >= last; "
            "return kept > processing.top_k && last < law.max ? std::nextafter(last, kInfinity) : last; "
            "}()")),
    defect("min-p of the mass", "relative to 1 and not to the likeliest token",
           (FILTERS, "«law.max + distance_of_weight(static_cast<double>(processing.min_p), law.scale)»",
            "[&] { double mass = 0.0; for (int64_t id = 0; id < row.size; ++id) mass += static_cast<double>("
            "weight_of_logit(row.at(id), law.max, law.scale, logits_floor(law.max, law.scale))); "
            "return law.max + distance_of_weight(std::min(1.0, static_cast<double>(processing.min_p) * "
            "mass), "
            "law.scale); }()")),
    equivalent("no bound before the k-th largest", "the whole row is looked through",
               (FILTERS, "const float bound = «lower_bound_of_kth(row, law, floor, summary, k, scratch)»;",
                "floor")),
    equivalent("interval cut elsewhere", "the threshold does not depend on it",
               (FILTERS, "const float middle = low + (high - low) * «0.5f»;", "0.3f")),
    equivalent("all tokens are candidates", "those too light for top-p too",
               (FILTERS, "if («light > 1e-30»)", "false")),
    defect("presence counts the prompt", "a token of the prompt is held against itself",
           (PENALTIES, "if («generated > 0») {\n    logit -= rule.frequency", "true")),
    defect("frequency counts the prompt", "tokens of the prompt count as output",
           (EDITS, "times += «i >= prompt ? 1 : 0»;", "1")),
    defect("presence per occurrence", "subtracted for every one of them",
           (PENALTIES, "logit -= «rule.presence»;", "rule.presence * static_cast<float>(generated)")),
    defect("repetition divides always", "negative logits rise",
           (PENALTIES, "«logit > 0.0f ? logit / rule.repetition : logit * rule.repetition»", "logit / "
                                                                                         "rule.repetition")),
    defect("repetition of the output alone", "the prompt does not count",
           (PENALTIES, "if («rule.repetition != 1.0f») logit =", "rule.repetition != 1.0f && generated > 0")),
    defect("minimum length forgets the path", "stop tokens are held back too long",
           (EDITS, "if («generated_ + static_cast<int64_t>(path.size()) < rule.min_new_tokens»)",
            "generated_ < rule.min_new_tokens")),
]  # fmt: skip

FAULTS = [
    defect("bad draft judged after a coin", "only the root's law is looked at before the walk",
           (ROWS, "dense(node)) «usable = law_usable(node);»", "usable = node > 0 || law_usable(node);")),
    defect("impossible draft accepted", "a token of declared mass 0 has an infinite ratio",
           (ROWS, "if («!(prob > 0.0 && prob < 1.001)») return false;", "false")),
    defect("equal siblings without replacement", "nobody could have drawn them",
           (ROWS, "if («args_.draw == Draw::without_replacement && removed(node, elders, child)») return "
                  "false;",
            "false")),
    defect("count beyond the rows", "a draft is verified by the next request's row",
           (VERIFY, "requested <= nodes && «requested < rows_there»;", "requested <= rows_there")),
    defect("restart at the root", "a row without a law sends the walk back after its coins (TV up to 0.25)",
           (VERIFY, "const TreeVerdict verdict = «walk(rows, rows.tree(), options, states, coins)»;",
            "[&] { const TreeVerdict found = walk(rows, rows.tree(), options, states, coins); "
            "return found.closing == Closing::argmax && found.node > 0 ? TreeVerdict{} : found; }()")),
    defect("bad draft not reported", "its status bit is lost",
           (VERIFY, "«status |= kBadDraft;»", "")),
    defect("lost law not reported", "its status bit is lost",
           (VERIFY, "if (verdict.closing == Closing::argmax) «status |= kLawLost;»", "")),
    defect("next length off by one", "the cache keeps a row too many",
           ("cpu/verdict.cpp", "static_cast<int64_t>(«base - 1 + static_cast<uint64_t>(emitted)»)",
            "base + static_cast<uint64_t>(emitted)")),
]  # fmt: skip

MUTANTS: list[Mutant] = [*DECISIONS, *WALK, *RANDOMNESS, *ROWS_AND_LAWS, *PROCESSING, *FAULTS]
