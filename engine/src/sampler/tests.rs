//! The sampler against a plain reference that sorts everything in double precision.

use blockplane_protocol::{SamplingParams, StopConditions, TokenId};
use proptest::{collection::vec, prelude::*};

use super::{
    Sampler,
    choose::{self, Filters},
};

const GREEDY: fn() -> SamplingParams = SamplingParams::default;

fn with_temperature(temperature: f32) -> SamplingParams {
    SamplingParams {
        temperature,
        ..SamplingParams::default()
    }
}

fn sample_once(params: &SamplingParams, prompt: &[TokenId], logits: &[f32]) -> TokenId {
    Sampler::new(params, None, 7, prompt).sample(logits).id
}

/// Probability of each token: softmax, then `min_p`, `top_k`, `top_p` on sorted copies. The second
/// result is how close a filter came to another decision: within rounding, either is right.
fn reference(logits: &[f32], filters: Filters) -> (Vec<f64>, f64) {
    let temperature = f64::from(filters.temperature);
    let scaled: Vec<f64> = logits.iter().map(|&l| f64::from(l) / temperature).collect();
    let max = scaled.iter().copied().fold(f64::MIN, f64::max);
    let mut weights: Vec<f64> = scaled.iter().map(|&l| (l - max).exp()).collect();
    let mut margin = f64::INFINITY;

    let min_p = f64::from(filters.min_p);
    if min_p > 0.0 {
        for weight in &mut weights {
            margin = margin.min((*weight / min_p - 1.0).abs());
            *weight = if *weight >= min_p { *weight } else { 0.0 };
        }
    }
    if filters.top_k > 0 && filters.top_k < weights.len() {
        let mut sorted = logits.to_vec();
        sorted.sort_by(|a, b| b.total_cmp(a));
        let least = sorted[filters.top_k - 1];
        for (weight, &logit) in weights.iter_mut().zip(logits) {
            *weight = if logit >= least { *weight } else { 0.0 };
        }
    }
    let total: f64 = weights.iter().sum();
    if filters.top_p < 1.0 {
        let mut order: Vec<usize> = (0..weights.len()).collect();
        order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]).then(a.cmp(&b)));
        let mut before = 0.0;
        for index in order {
            let top_p = f64::from(filters.top_p);
            margin = margin.min((before / total - top_p).abs());
            let weight = weights[index];
            if before / total >= top_p {
                weights[index] = 0.0;
            }
            before += weight;
        }
    }
    let total: f64 = weights.iter().sum();
    (weights.iter().map(|w| w / total).collect(), margin)
}

fn filters() -> impl Strategy<Value = Filters> {
    let min_p = prop_oneof![2 => Just(0.0f32), 1 => 0.001f32..1.0];
    let top_k = prop_oneof![2 => Just(0usize), 3 => 1..80usize];
    let top_p = prop_oneof![1 => Just(1.0f32), 2 => 0.01f32..1.0];
    (0.05f32..3.0, min_p, top_k, top_p).prop_map(|(temperature, min_p, top_k, top_p)| Filters {
        temperature,
        min_p,
        top_k,
        top_p,
    })
}

/// Logits with many ties, too: quantised models have them.
fn logits() -> impl Strategy<Value = Vec<f32>> {
    let fine = -12f32..12.0;
    let coarse = (-6i8..6).prop_map(f32::from);
    prop_oneof![vec(fine, 1..400), vec(coarse, 1..400)]
}

proptest! {
    /// Evenly spaced random numbers fall on each token in proportion to its probability.
    #[test]
    fn each_token_has_the_share_that_the_reference_gives_it(
        logits in logits(), filters in filters(),
    ) {
        const NUMBERS: u32 = 1_000;
        let (probabilities, margin) = reference(&logits, filters);
        prop_assume!(margin > 1e-4);
        let mut counts = vec![0u32; logits.len()];
        for n in 0..NUMBERS {
            let random = (f64::from(n) + 0.5) / f64::from(NUMBERS);
            let id = choose::at_random(&logits, filters, random).unwrap();
            counts[id as usize] += 1;
        }
        for (id, (&count, probability)) in counts.iter().zip(probabilities).enumerate() {
            let expected = probability * f64::from(NUMBERS);
            prop_assert!(
                (f64::from(count) - expected).abs() <= 1.01,
                "token {} was chosen {} times, expected {}", id, count, expected
            );
        }
    }

    #[test]
    fn greedy_takes_the_first_of_the_largest(logits in logits()) {
        let mut best = 0;
        for (index, &logit) in logits.iter().enumerate() {
            if logit > logits[best] {
                best = index;
            }
        }
        prop_assert_eq!(choose::likeliest(&logits).map(|id| id as usize), Some(best));
        prop_assert_eq!(sample_once(&GREEDY(), &[], &logits) as usize, best);
    }

    /// Whatever the logits, a possible token is chosen if there is one.
    #[test]
    fn impossible_tokens_are_never_chosen(
        logits in vec(prop_oneof![
            Just(f32::NAN), Just(f32::NEG_INFINITY), Just(f32::INFINITY), Just(f32::MIN),
            Just(f32::MAX), -5f32..5.0,
        ], 1..40),
        filters in filters(), random in 0f64..1.0,
    ) {
        let possible = |id: TokenId| logits[id as usize] > f32::NEG_INFINITY;
        let any = logits.iter().any(|&logit| logit > f32::NEG_INFINITY);
        for chosen in [choose::likeliest(&logits), choose::at_random(&logits, filters, random)] {
            prop_assert_eq!(chosen.is_some(), any);
            prop_assert!(chosen.is_none_or(possible));
        }
    }

    #[test]
    fn logprobs_are_those_of_the_raw_logits(logits in logits(), count in 0..21u32) {
        let params = SamplingParams {
            temperature: 0.5,
            top_k: 3,
            logit_bias: vec![(0, 5.0)],
            repetition_penalty: 1.5,
            ..SamplingParams::default()
        };
        let output = Sampler::new(&params, Some(count), 1, &[0]).sample(&logits);
        let total: f64 = logits.iter().map(|&l| f64::from(l).exp()).sum();
        let expected = |id: TokenId| f64::from(logits[id as usize]) - total.ln();
        let close = |id, logprob: f32| (f64::from(logprob) - expected(id)).abs() < 1e-4;
        prop_assert!(close(output.id, output.logprob.unwrap()));

        let mut order: Vec<usize> = (0..logits.len()).collect();
        order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]).then(a.cmp(&b)));
        order.truncate(count as usize);
        prop_assert!(output.top.iter().map(|top| top.id as usize).eq(order));
        prop_assert!(output.top.iter().all(|top| close(top.id, top.logprob)));
    }

    /// Stopping anywhere and going on in another sampler gives the same tokens.
    #[test]
    fn a_resumed_sampler_goes_on_as_the_first_would_have(
        rows in vec(vec(-4f32..4.0, 50), 2..12), cut in any::<prop::sample::Index>(), seed: u64,
    ) {
        let params = SamplingParams {
            temperature: 1.0,
            top_p: 0.95,
            presence_penalty: 0.5,
            frequency_penalty: 0.3,
            repetition_penalty: 1.2,
            ..SamplingParams::default()
        };
        let stop = StopConditions { min_tokens: 4, ..StopConditions::default() };
        let start = || Sampler::new(&params, None, seed, &[3, 4, 5]).with_min_tokens(&stop, &[1]);
        let run = |sampler: &mut Sampler, rows: &[Vec<f32>]| -> Vec<TokenId> {
            rows.iter().map(|row| sampler.sample(row).id).collect()
        };
        let whole = run(&mut start(), &rows);
        let (head, tail) = rows.split_at(cut.index(rows.len()));
        let mut first = start();
        let mut tokens = run(&mut first, head);
        let mut second = start();
        second.resume(first.state(), &tokens);
        tokens.extend(run(&mut second, tail));
        prop_assert_eq!(tokens, whole);
    }
}

/// Chi-square of real draws against the reference; the seed is fixed. With 5 tokens left there are
/// 4 degrees of freedom: 18.5 is exceeded once in a thousand.
#[test]
fn draws_follow_the_distribution() {
    const DRAWS: u32 = 20_000;
    let logits = [1.0, 2.0, -1.0, 0.5, 3.0, -8.0, 1.5];
    let params = SamplingParams {
        top_p: 0.98,
        ..with_temperature(1.3)
    };
    let (probabilities, _) = reference(&logits, Filters::of(&params));
    let mut sampler = Sampler::new(&params, None, 2024, &[]);
    let mut counts = [0u32; 7];
    for _ in 0..DRAWS {
        counts[sampler.sample(&logits).id as usize] += 1;
    }
    let mut chi2 = 0.0;
    for (&count, probability) in counts.iter().zip(probabilities) {
        let expected = probability * f64::from(DRAWS);
        if expected > 0.0 {
            chi2 += (f64::from(count) - expected).powi(2) / expected;
        } else {
            assert_eq!(count, 0, "a token that was filtered out");
        }
    }
    assert!(chi2 < 18.5, "chi-square {chi2}");
}

#[test]
fn the_same_seed_gives_the_same_tokens_and_another_one_others() {
    let row: Vec<f32> = (0..1000u16).map(|n| f32::from(n % 17) / 4.0).collect();
    let tokens = |seed| -> Vec<TokenId> {
        let mut sampler = Sampler::new(&with_temperature(1.0), None, seed, &[]);
        (0..20).map(|_| sampler.sample(&row).id).collect()
    };
    assert_eq!(tokens(5), tokens(5));
    assert_ne!(tokens(5), tokens(6));
}

#[test]
fn a_tiny_temperature_is_greedy() {
    assert_eq!(
        sample_once(&with_temperature(1e-6), &[], &[0.0, 1.0, 0.999]),
        1
    );
}

#[test]
fn top_k_keeps_ties_at_its_edge() {
    let filters = Filters {
        temperature: 1.0,
        min_p: 0.0,
        top_k: 2,
        top_p: 1.0,
    };
    let logits = [1.0, 2.0, 1.0, 0.0];
    let mut chosen: Vec<TokenId> = (0..100)
        .filter_map(|n| choose::at_random(&logits, filters, f64::from(n) / 100.0))
        .collect();
    chosen.sort_unstable();
    chosen.dedup();
    assert_eq!(chosen, [0, 1, 2]);
}

#[test]
fn top_p_keeps_the_token_that_crosses_the_threshold_and_no_more() {
    let logits: Vec<f32> = [0.5f32, 0.3, 0.15, 0.05].iter().map(|p| p.ln()).collect();
    let kept = |top_p| -> Vec<TokenId> {
        let filters = Filters {
            temperature: 1.0,
            min_p: 0.0,
            top_k: 0,
            top_p,
        };
        let numbers = (0..1000).map(|n| f64::from(n) / 1000.0);
        let chosen = numbers.filter_map(|random| choose::at_random(&logits, filters, random));
        let mut chosen: Vec<TokenId> = chosen.collect();
        chosen.sort_unstable();
        chosen.dedup();
        chosen
    };
    assert_eq!(kept(0.01), [0]);
    assert_eq!(kept(0.49), [0]);
    assert_eq!(kept(0.51), [0, 1]);
    assert_eq!(kept(0.81), [0, 1, 2]);
    assert_eq!(kept(0.96), [0, 1, 2, 3]);
}

#[test]
fn penalties_count_what_they_should() {
    let logits = [2.0, 1.9, -1.0];
    let repetition = SamplingParams {
        repetition_penalty: 2.0,
        ..GREEDY()
    };
    assert_eq!(sample_once(&repetition, &[], &logits), 0);
    assert_eq!(
        sample_once(&repetition, &[0], &logits),
        1,
        "the prompt counts"
    );
    assert_eq!(
        sample_once(&repetition, &[0, 1], &[0.0, -0.3, -0.5]),
        0,
        "negative ones sink"
    );
    assert_eq!(
        sample_once(&repetition, &[1], &[-0.7, -0.4, -0.9]),
        0,
        "negative ones sink"
    );

    let presence = SamplingParams {
        presence_penalty: 0.15,
        ..GREEDY()
    };
    assert_eq!(
        sample_once(&presence, &[0, 0], &logits),
        0,
        "the prompt does not count"
    );
    let mut sampler = Sampler::new(&presence, None, 0, &[]);
    let tokens: Vec<TokenId> = (0..4).map(|_| sampler.sample(&logits).id).collect();
    assert_eq!(tokens, [0, 1, 0, 0], "once each, however often");

    let frequency = SamplingParams {
        frequency_penalty: 0.15,
        ..GREEDY()
    };
    let mut sampler = Sampler::new(&frequency, None, 0, &[]);
    let tokens: Vec<TokenId> = (0..5).map(|_| sampler.sample(&logits).id).collect();
    assert_eq!(tokens, [0, 1, 0, 1, 0], "each time");
}

#[test]
fn bias_moves_logits_and_is_penalised_with_them() {
    let bias = |params: SamplingParams, bias| SamplingParams {
        logit_bias: vec![(1, bias), (77, 100.0)],
        ..params
    };
    assert_eq!(sample_once(&bias(GREEDY(), 1.5), &[], &[2.0, 1.0]), 1);
    assert_eq!(sample_once(&bias(GREEDY(), -100.0), &[], &[2.0, 3.0]), 0);
    let repetition = SamplingParams {
        repetition_penalty: 2.0,
        ..GREEDY()
    };
    // (1 + 2.5) / 2 < 2, although 1 / 2 + 2.5 > 2.
    assert_eq!(sample_once(&bias(repetition, 2.5), &[1], &[2.0, 1.0]), 0);
}

#[test]
fn stop_tokens_are_held_back_until_min_tokens() {
    let stop = StopConditions {
        min_tokens: 2,
        stop_token_ids: vec![2],
        ignore_eos: true,
        ..StopConditions::default()
    };
    let logits = [0.0, 5.0, 4.0, 1.0];
    let mut sampler = Sampler::new(&GREEDY(), None, 0, &[]).with_min_tokens(&stop, &[1]);
    let tokens: Vec<TokenId> = (0..3).map(|_| sampler.sample(&logits).id).collect();
    assert_eq!(tokens, [3, 3, 1]);
}

#[test]
fn a_row_without_a_possible_token_gives_the_first() {
    let nothing = [f32::NAN, f32::NEG_INFINITY];
    assert_eq!(sample_once(&GREEDY(), &[], &nothing), 0);
    assert_eq!(sample_once(&with_temperature(1.0), &[], &nothing), 0);
}
