//! The way of a contender to the front of its line.

use std::pin::pin;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use etcd_client::GetOptions;
use tokio::time::Instant;

use super::{Line, Membership, Standing};
use crate::error::Result;
use crate::session::Core;
use crate::session::generation::Generation;
use crate::session::owned_key::Owned;
use crate::session::rpc::{KeyFacts, revision};
use crate::session::watch::{News, Range, Subscription};

/// A contender on its way to the front.
pub(super) struct Waiter<'a> {
    pub(super) core: &'a Arc<Core>,
    pub(super) generation: &'a Arc<Generation>,
    pub(super) line: &'a Arc<Line>,
    pub(super) facts: &'a Arc<Owned>,
    pub(super) membership: &'a Membership,
    /// A share of the line's watch.
    pub(super) watch: Option<Subscription>,
    /// When it entered.
    pub(super) entered: Instant,
    /// How many were ahead then; 0 if unknown.
    pub(super) ahead_at_entry: usize,
    /// How often it watched the line anew because nothing came.
    pub(super) doubts: u8,
}

/// How often a waiter watches the line anew because nothing comes. Each of these watches is in step most likely.
const DOUBTS: u8 = 3;

/// By then a watch has caught up that lagged behind.
const LAG: Duration = Duration::from_millis(100);

/// Why a waiter looks again.
enum Wake {
    /// Its turn: the revision that made it so.
    First(i64),
    /// What is ahead may have changed; this is known of it.
    Look(Option<Standing>),
    /// The key it watched is gone, so the front is near; or the line should have moved, and the watch may lag.
    Near,
}

impl Waiter<'_> {
    /// Waits until the own key is the first of the line, or the lease is over; gives the token.
    pub(super) async fn wait(&mut self, known: Option<Standing>) -> Result<i64> {
        let (generation, facts) = (self.generation, self.facts);
        tokio::select! {
            biased;
            () = generation.ended() => Err(facts.error()),
            token = self.advance(known) => token,
        }
    }

    async fn advance(&mut self, mut known: Option<Standing>) -> Result<i64> {
        loop {
            if known.as_ref().is_some_and(Standing::is_first) {
                return Ok(known.map_or(0, |standing| standing.revision));
            }
            let wake = if self.membership.leads() {
                // Boxed, because few of many waiters are here.
                Box::pin(self.lead(known.take())).await?
            } else {
                self.watch = None;
                // A waiter that only waits should be small.
                drop(known.take());
                Wake::Look(self.mail().await)
            };
            known = match wake {
                Wake::First(token) => return Ok(token),
                Wake::Look(standing) => standing,
                Wake::Near => {
                    // Watched before the read, the line needs no second one.
                    self.line_watch().await?;
                    None
                }
            };
        }
    }

    /// Waits as the first of this session's contenders.
    async fn lead(&mut self, known: Option<Standing>) -> Result<Wake> {
        let standing = match known {
            Some(standing) => standing,
            None => self.look().await?,
        };
        if standing.is_first() {
            Ok(Wake::First(standing.revision))
        } else if standing.more {
            self.watch = None;
            self.watch_from_afar(standing).await
        } else {
            // Boxed, because only the first of many waiters are here.
            Box::pin(self.follow(standing)).await
        }
    }

    /// Follows the deletions of the whole line, with everybody ahead known.
    async fn follow(&mut self, mut standing: Standing) -> Result<Wake> {
        let Some(covered) = self.line_watch().await? else { return Ok(Wake::Look(None)) };
        if covered > standing.revision {
            standing = self.look().await?;
            if standing.is_first() || standing.more {
                return Ok(Wake::Look(Some(standing)));
            }
        }
        let Some(mut watch) = self.watch.take() else { return Ok(Wake::Look(None)) };
        let mut heard = standing.revision;
        let mut silent = self.doubts < DOUBTS && watch.may_lag(standing.revision);
        let mut overdue = pin!(self.overdue(&standing));
        loop {
            let news = tokio::select! {
                biased;
                news = watch.next() => news?,
                () = &mut overdue, if silent => {
                    self.doubts += 1;
                    return Ok(Wake::Near);
                }
                told = self.mail() => match told {
                    // Older than what was heard already: going back would wait for deletions that came before.
                    Some(told) if told.revision <= heard => continue,
                    told => {
                        self.watch = Some(watch);
                        return Ok(Wake::Look(told));
                    }
                },
            };
            let News::Events(events) = news else { return Ok(Wake::Look(None)) };
            silent = false;
            heard = events.last().map_or(heard, |event| event.revision.max(heard));
            let mut emptied = None;
            for event in events.iter().filter(|event| event.revision > standing.revision) {
                if event.key() == self.facts.key {
                    return Err(self.facts.error());
                }
                let before = standing.ahead.len();
                standing.ahead.retain(|key| key != event.key());
                if before > 0 && standing.ahead.is_empty() {
                    emptied = Some(event.revision);
                }
            }
            if let Some(token) = emptied {
                self.watch = Some(watch);
                return Ok(Wake::First(token));
            }
        }
    }

    /// Waits until the line should have moved, if it goes on as it went since the entry; for ever if that is not known,
    /// or so slow that a watch that lags is in time.
    fn overdue(&self, standing: &Standing) -> impl Future<Output = ()> + use<> {
        let gone = self.ahead_at_entry.checked_sub(standing.ahead.len());
        let gone = gone.and_then(|gone| u32::try_from(gone).ok());
        let pace = gone.and_then(|gone| self.entered.elapsed().checked_div(gone));
        let pause = pace.map(|pace| pace * 3).filter(|pause| *pause < LAG);
        async move {
            match pause {
                Some(pause) => tokio::time::sleep(pause).await,
                None => std::future::pending().await,
            }
        }
    }

    /// Watches one key some places ahead.
    async fn watch_from_afar(&mut self, standing: Standing) -> Result<Wake> {
        let Some(target) = standing.ahead.last().cloned() else { return Ok(Wake::Look(None)) };
        let mut watch = self.core.deletions.watch(&Range::key(&target));
        let Some(covered) = watch.covered().await? else { return Ok(Wake::Look(None)) };
        if covered > standing.revision {
            // One key costs etcd the same however long the line is, and all who begin to wait ask at once.
            let options = GetOptions::new().with_keys_only();
            let read = Box::pin(self.core.rpc.get(&target, options, None)).await?;
            if read.kvs().first().is_none_or(|target| target.create_revision() > standing.revision) {
                return Ok(Wake::Near);
            }
        }
        drop(standing);
        tokio::select! {
            biased;
            news = watch.next() => match news? {
                // Of an earlier key of that name, perhaps: then a look shows that it is far still.
                News::Events(_) => Ok(Wake::Near),
                News::Gap => Ok(Wake::Look(None)),
            },
            standing = self.mail() => Ok(Wake::Look(standing)),
        }
    }

    /// Takes a share of the line's watch, and tells above which revision it tells everything.
    async fn line_watch(&mut self) -> Result<Option<i64>> {
        let mut watch = self.watch.take().unwrap_or_else(|| self.core.deletions.watch(&self.line.range));
        let covered = watch.covered().await?;
        self.watch = covered.is_some().then_some(watch);
        Ok(covered)
    }

    /// Reads who is ahead.
    async fn look(&self) -> Result<Standing> {
        let (prefix, me) = (self.line.prefix.as_bytes(), &self.membership.position);
        let read = Box::pin(self.core.rpc.get(prefix, self.line.standing_options(Some(me.created)), None));
        let response = read.await?;
        let keys = response.kvs().iter().map(KeyFacts::from);
        Standing::read(keys, response.more(), me, revision(response.header()))
            .ok_or_else(|| self.facts.error())
    }

    /// Waits for word from the contender of this session that was ahead.
    async fn mail(&self) -> Option<Standing> {
        let mailbox = &self.membership.mailbox;
        mailbox.arrived.notified().await;
        mailbox.standing.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}
