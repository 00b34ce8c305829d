#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;

/// Instances `a`, `b`, … with these weights.
fn fleet(weights: &[u32]) -> Vec<Arc<Instance>> {
    let named = |(at, weight): (usize, &u32)| {
        let name = char::from(b'a' + u8::try_from(at).unwrap());
        Arc::new(Instance::new("s", name).weight(*weight))
    };
    weights.iter().enumerate().map(named).collect()
}

fn id(pick: &Pick) -> String {
    pick.instance().id.clone()
}

/// How often each is chosen.
fn count(balancer: &Balancer, fleet: &[Arc<Instance>], picks: usize) -> BTreeMap<String, usize> {
    let mut counts = BTreeMap::new();
    for _ in 0..picks {
        *counts.entry(id(&balancer.pick(fleet).unwrap())).or_default() += 1;
    }
    counts
}

fn of(counts: &BTreeMap<String, usize>, instance: &Instance) -> usize {
    counts.get(&instance.id).copied().unwrap_or_default()
}

#[test]
fn nobody_is_picked_of_none() {
    for policy in [Policy::RoundRobin, Policy::WeightedRoundRobin, Policy::Random, Policy::LeastPending] {
        assert!(Balancer::new(policy).pick(&[]).is_none());
    }
}

#[test]
fn weights_are_spread_evenly() {
    let (balancer, fleet) = (Balancer::new(Policy::WeightedRoundRobin), fleet(&[5, 1, 1]));
    let order: String = (0..7).map(|_| id(&balancer.pick(&fleet).unwrap())).collect();
    assert_eq!(order, "aabacaa");
}

#[test]
fn weight_zero_is_for_need_only() {
    let balancer = Balancer::new(Policy::WeightedRoundRobin);
    assert_eq!(of(&count(&balancer, &fleet(&[0, 1]), 100), &fleet(&[0])[0]), 0);
    assert_eq!(count(&balancer, &fleet(&[0, 0]), 100).into_values().collect::<Vec<_>>(), [50, 50]);
}

#[test]
fn a_heavy_past_does_not_count_after_the_weights_have_changed() {
    let balancer = Balancer::new(Policy::WeightedRoundRobin);
    count(&balancer, &fleet(&[1_000_000, 1]), 400_000);
    let counts = count(&balancer, &fleet(&[1, 1]), 10);
    assert_eq!(counts.into_values().collect::<Vec<_>>(), [5, 5]);
}

#[tokio::test(start_paused = true)]
async fn failed_instances_rest_for_a_while() {
    let all = fleet(&[1, 1, 1]);
    for policy in [Policy::RoundRobin, Policy::WeightedRoundRobin, Policy::Random, Policy::LeastPending] {
        let balancer = Balancer::new(policy).rest(Duration::from_secs(7));
        let failed = balancer.pick(&all).unwrap();
        let resting = failed.instance().clone();
        failed.failed();
        assert_eq!(of(&count(&balancer, &all, 300), &resting), 0, "{policy:?}");
        tokio::time::advance(Duration::from_secs(8)).await;
        assert!(of(&count(&balancer, &all, 300), &resting) > 50, "{policy:?}");
        // When nobody is left, a tired one is better than none.
        for _ in 0..3 {
            balancer.pick(&all).unwrap().failed();
        }
        assert!(balancer.pick(&all).is_some());
    }
}

#[test]
fn those_left_share_what_a_resting_one_would_take() {
    let (balancer, all) = (Balancer::new(Policy::RoundRobin), fleet(&[1, 1, 1]));
    let failed = balancer.pick(&all).unwrap();
    let resting = failed.instance().clone();
    failed.failed();
    let counts = count(&balancer, &all, 100);
    assert!(all.iter().all(|one| of(&counts, one) == if *one == resting { 0 } else { 50 }), "{counts:?}");
}

#[test]
fn who_is_busy_is_spared() {
    let (balancer, all) = (Balancer::new(Policy::LeastPending), fleet(&[1, 1]));
    let busy = balancer.pick(&all).unwrap();
    let counts = count(&balancer, &all, 100);
    assert_eq!(of(&counts, busy.instance()), 0, "with two, both are compared");
    drop(busy);
    assert!(count(&balancer, &all, 100).values().all(|count| *count > 20));
}

#[test]
fn calls_stay_pending_when_the_instances_change() {
    let balancer = Balancer::new(Policy::LeastPending);
    let busy = balancer.pick(&fleet(&[1])).unwrap();
    let counts = count(&balancer, &fleet(&[2, 1]), 100);
    assert_eq!(of(&counts, busy.instance()), 0);
}

proptest! {
    #[test]
    fn round_robin_is_exact_within_one(members in 1..20_usize, picks in 1..500_usize) {
        let all = fleet(&vec![1; members]);
        let counts = count(&Balancer::new(Policy::RoundRobin), &all, picks);
        for one in &all {
            let share = of(&counts, one);
            prop_assert!(share == picks / members || share == picks.div_ceil(members), "{counts:?}");
        }
    }

    /// Whoever was picked is not picked again before all the others who were there all the time.
    #[test]
    fn round_robin_goes_on_where_it_was_when_instances_come_and_go(
        sets in prop::collection::vec(prop::collection::btree_set(0..12_usize, 1..12), 2..20)
    ) {
        let (balancer, all) = (Balancer::new(Policy::RoundRobin), fleet(&[1; 12]));
        let mut last = None;
        for set in sets {
            let present: Vec<_> = set.iter().map(|at| all[*at].clone()).collect();
            let picked = id(&balancer.pick(&present).unwrap());
            if let Some(last) = last {
                let next = present.iter().map(|one| &one.id).find(|id| **id > last).unwrap_or(&present[0].id);
                prop_assert_eq!(&picked, next);
            }
            last = Some(picked);
        }
    }

    #[test]
    fn weighted_shares_are_exact_within_one_per_member(weights in prop::collection::vec(0..50_u32, 1..10), picks in 1..2000_usize) {
        let (all, total) = (fleet(&weights), weights.iter().sum::<u32>());
        prop_assume!(total > 0);
        let counts = count(&Balancer::new(Policy::WeightedRoundRobin), &all, picks);
        for one in &all {
            let (share, due) = (of(&counts, one) as f64, picks as f64 * f64::from(one.weight) / f64::from(total));
            let slack = all.len() as f64;
            prop_assert!((share - due).abs() <= slack, "{}: {share} of {due}", one.id);
        }
        // And exactly, after a whole round.
        let counts = count(&Balancer::new(Policy::WeightedRoundRobin), &all, total as usize * 3);
        prop_assert!(all.iter().all(|one| of(&counts, one) == one.weight as usize * 3));
    }
}

#[test]
fn chance_is_even_within_a_tenth() {
    for (policy, members) in [(Policy::Random, 3), (Policy::LeastPending, 3), (Policy::LeastPending, 5)] {
        let all = fleet(&vec![1; members]);
        let counts = count(&Balancer::new(policy), &all, 4000 * members);
        let even = |one: &Arc<Instance>| of(&counts, one).abs_diff(4000) <= 400;
        assert!(all.iter().all(even), "{counts:?}");
    }
}
