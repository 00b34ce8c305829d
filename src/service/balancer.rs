//! Which instance takes the next call.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use super::Instance;

/// How a [`Balancer`] chooses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Policy {
    /// One after the other.
    RoundRobin,
    /// Each as often as its weight says, spread evenly: with the weights 3 and 1 the order is a a b a, not a a a b.
    WeightedRoundRobin,
    /// Any.
    Random,
    /// Of two chosen at random, the one with fewer calls pending.
    LeastPending,
}

/// Chooses an instance for each call.
///
/// It is given the instances at each pick, so they may change in between: each keeps its place and its calls as long as
/// it is there. Instances that failed rest for a while: they are not picked as long as there are others.
///
/// Share one between all who call the same service.
///
/// # Examples
///
/// ```
/// use std::sync::Arc;
/// use etcd_recipes::service::{Balancer, Instance, Policy};
///
/// let instances = [Arc::new(Instance::new("a", "x:1")), Arc::new(Instance::new("a", "y:1"))];
/// let balancer = Balancer::new(Policy::RoundRobin);
/// let first = balancer.pick(&instances).unwrap();
/// let second = balancer.pick(&instances).unwrap();
/// assert_ne!(first.instance().address, second.instance().address);
/// // That call could not be made: until it has rested, the other takes all.
/// let failed = first.instance().clone();
/// first.failed();
/// assert!((0..9).all(|_| balancer.pick(&instances).unwrap().instance() != &failed));
/// ```
pub struct Balancer {
    policy: Policy,
    rest: Duration,
    state: Mutex<State>,
}

struct State {
    members: Vec<Member>,
    /// Where round robin goes on.
    next: usize,
    random: fastrand::Rng,
}

struct Member {
    instance: Arc<Instance>,
    load: Arc<Load>,
    /// What smooth weighted round robin owes it.
    credit: i64,
}

/// What is known of an instance's calls.
#[derive(Default)]
struct Load {
    pending: AtomicUsize,
    rests_until: Mutex<Option<Instant>>,
}

/// The instance for one call, which is pending until this is dropped.
#[must_use = "the call counts as pending only while this is kept"]
pub struct Pick {
    instance: Arc<Instance>,
    load: Arc<Load>,
    rest: Duration,
}

impl Balancer {
    /// Begins without knowing any instance, at a random one.
    pub fn new(policy: Policy) -> Self {
        let mut random = fastrand::Rng::new();
        let next = random.usize(..);
        let state = Mutex::new(State { members: Vec::new(), next, random });
        Self { policy, rest: Duration::from_secs(5), state }
    }

    /// How long an instance rests after a failure was reported. Defaults to 5 seconds.
    #[must_use]
    pub fn rest(mut self, rest: Duration) -> Self {
        self.rest = rest;
        self
    }

    /// Chooses one of these instances; `None` if there are none.
    ///
    /// If all rest, one of them is chosen all the same.
    pub fn pick(&self, instances: &[Arc<Instance>]) -> Option<Pick> {
        let mut state = self.state();
        state.learn(instances);
        let at = state.choose(self.policy)?;
        let Member { instance, load, .. } = state.members.get(at)?;
        load.pending.fetch_add(1, Ordering::Relaxed);
        Some(Pick { instance: instance.clone(), load: load.clone(), rest: self.rest })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl std::fmt::Debug for Balancer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Balancer").field("policy", &self.policy).finish_non_exhaustive()
    }
}

// === impl Pick ===

impl Pick {
    /// Where to call.
    pub fn instance(&self) -> &Arc<Instance> {
        &self.instance
    }

    /// Reports that the instance could not be reached: it rests for a while.
    pub fn failed(self) {
        let until = Instant::now() + self.rest;
        *self.load.rests_until.lock().unwrap_or_else(PoisonError::into_inner) = Some(until);
    }
}

impl Drop for Pick {
    fn drop(&mut self) {
        self.load.pending.fetch_sub(1, Ordering::Relaxed);
    }
}

impl std::fmt::Debug for Pick {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pick").field("instance", &self.instance).finish_non_exhaustive()
    }
}

// === impl State ===

impl State {
    /// Takes in who is there. What is known of those who stay is kept.
    fn learn(&mut self, instances: &[Arc<Instance>]) {
        let known = |(member, instance): (&Member, &Arc<Instance>)| Arc::ptr_eq(&member.instance, instance);
        if self.members.len() == instances.len() && self.members.iter().zip(instances).all(known) {
            return;
        }
        let before = self.next.checked_sub(1).map(|last| last % self.members.len().max(1));
        let last = before.and_then(|last| self.members.get(last)).map(|member| member.instance.clone());
        let mut old: std::collections::HashMap<_, _> =
            self.members.drain(..).map(|member| (member.instance.id.clone(), member.load)).collect();
        for instance in instances {
            let load = old.remove(&instance.id).unwrap_or_default();
            // The credits belong to the weights and the company they were earned with.
            self.members.push(Member { instance: instance.clone(), load, credit: 0 });
        }
        // Whoever follows the last one is next.
        if let Some(last) = last {
            self.next = instances.iter().position(|instance| instance.id > last.id).unwrap_or(0);
        }
    }

    fn choose(&mut self, policy: Policy) -> Option<usize> {
        let now = Instant::now();
        let mut awake: Vec<usize> =
            (0..self.members.len()).filter(|at| !self.members[*at].load.rests(now)).collect();
        if awake.is_empty() {
            awake = (0..self.members.len()).collect();
        }
        if awake.is_empty() {
            return None;
        }
        Some(match policy {
            Policy::RoundRobin => self.next_of(&awake),
            Policy::WeightedRoundRobin => self.heaviest_of(&awake),
            Policy::Random => awake[self.random.usize(..awake.len())],
            Policy::LeastPending => self.freer_of_two(&awake),
        })
    }

    fn next_of(&mut self, awake: &[usize]) -> usize {
        let turn = self.next % self.members.len();
        let at = awake.iter().copied().find(|at| *at >= turn).unwrap_or(awake[0]);
        self.next = at + 1;
        at
    }

    /// Everybody earns its weight, the richest is chosen and pays what all earned.
    fn heaviest_of(&mut self, awake: &[usize]) -> usize {
        let weights: Vec<i64> = awake.iter().map(|at| i64::from(self.members[*at].instance.weight)).collect();
        let total: i64 = weights.iter().sum();
        if total == 0 {
            return self.next_of(awake);
        }
        let mut richest = None;
        for (at, weight) in awake.iter().zip(weights).filter(|(_, weight)| *weight > 0) {
            let member = &mut self.members[*at];
            member.credit += weight;
            let credit = member.credit;
            if richest.is_none_or(|(most, _)| credit > most) {
                richest = Some((credit, *at));
            }
        }
        let Some((_, at)) = richest else { return awake[0] };
        self.members[at].credit -= total;
        at
    }

    fn freer_of_two(&mut self, awake: &[usize]) -> usize {
        let first = self.random.usize(..awake.len());
        if awake.len() == 1 {
            return awake[first];
        }
        // Any but the first.
        let second = (first + 1 + self.random.usize(..awake.len() - 1)) % awake.len();
        let pending = |at: usize| self.members[awake[at]].load.pending.load(Ordering::Relaxed);
        awake[if pending(second) < pending(first) { second } else { first }]
    }
}

impl Load {
    /// Whether it is not to be called for now.
    fn rests(&self, now: Instant) -> bool {
        let until = *self.rests_until.lock().unwrap_or_else(PoisonError::into_inner);
        until.is_some_and(|until| now < until)
    }
}

#[cfg(test)]
mod tests;
