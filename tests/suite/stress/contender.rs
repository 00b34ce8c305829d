//! One that locks, tries, changes its mind, and goes away without a word.

use std::sync::Arc;
use std::time::{Duration, Instant};

use etcd_client::{Compare, CompareOp, Txn, TxnOp};
use etcd_recipes::{Error, Mutex, MutexGuard, Session};

use super::oracle::{Oracle, Write};
use crate::support::poll::{drop_after_polls, drop_when_woken};

pub(super) struct Contender {
    session: Session,
    mutex: Mutex,
    oracle: Arc<Oracle>,
    random: fastrand::Rng,
}

impl Contender {
    pub(super) fn new(session: &Session, name: &str, oracle: Arc<Oracle>, random: fastrand::Rng) -> Self {
        Self { session: session.clone(), mutex: Mutex::new(session, name).unwrap(), oracle, random }
    }

    pub(super) async fn run(mut self, until: Instant) {
        while Instant::now() < until {
            if let Some(guard) = self.acquire().await {
                self.oracle.enters(guard.token());
                for _ in 0..self.random.usize(0..3) {
                    self.write(&guard).await;
                }
                self.oracle.leaves();
                self.release(guard).await;
            }
            tokio::time::sleep(Duration::from_millis(self.random.u64(0..10))).await;
        }
    }

    /// Tries to get the lock in one of many ways.
    async fn acquire(&mut self) -> Option<MutexGuard> {
        let (polls, patience) = (self.random.usize(0..6), Duration::from_millis(self.random.u64(0..400)));
        let mutex = &self.mutex;
        match self.random.u32(0..100) {
            0..40 => Some(mutex.lock().await.unwrap()),
            40..55 => mutex.try_lock().await.unwrap(),
            55..65 => drop_after_polls(polls, mutex.lock()).await.map(Result::unwrap),
            65..75 => drop_when_woken(polls + 1, mutex.lock()).await.map(Result::unwrap),
            75..90 => tokio::time::timeout(patience, mutex.lock()).await.ok().map(Result::unwrap),
            _ => drop_after_polls(polls, mutex.try_lock()).await.and_then(Result::unwrap),
        }
    }

    /// Counts one further, fenced.
    async fn write(&mut self, guard: &MutexGuard) {
        let (write, modified) = self.oracle.next(guard.token()).await;
        let unchanged = Compare::mod_revision(self.oracle.key(), CompareOp::Equal, modified);
        let put = TxnOp::put(self.oracle.key(), write.text(), None);
        match guard.txn(Txn::new().when([unchanged]).and_then([put])).await {
            Ok(response) => {
                assert!(response.succeeded(), "somebody else wrote while {} was held", guard.token());
                self.oracle.wrote(&write);
            }
            // The hold decides what becomes of it: it is not written any more once that has ended.
            Err(Error::OutcomeUnknown { .. }) => self.oracle.may_have_written(&write),
            Err(error) => panic!("{error}; held: {}, {:?}", guard.is_held(), self.session),
        }
    }

    async fn release(&mut self, guard: MutexGuard) {
        let polls = self.random.usize(0..4);
        match self.random.u32(0..100) {
            0..60 => guard.unlock().await.unwrap(),
            60..80 => drop(guard),
            _ => drop_after_polls(polls, guard.unlock()).await.map_or((), Result::unwrap),
        }
    }
}

impl Write {
    fn text(&self) -> String {
        self.to_string()
    }
}
