//! The requests of a consumer: take, claim, look, give up. Each runs to its end and answers who asked.

use std::sync::{Arc, Weak};
use std::time::Duration;

use etcd_client::GetOptions;
use tokio::sync::mpsc::UnboundedSender;
use tokio::sync::oneshot;

use super::chain::{self, Candidate};
use super::dead;
use super::hold::{Claimed, Hold};
use super::item::{Item, Parcel};
use super::keys::Keys;
use super::shelf::Tried;
use crate::error::{Error, Result};
use crate::session::once::{Done, Record};
use crate::session::owned_key::Owned;
use crate::session::{Core, participant};

/// What somebody waits for.
#[derive(Debug)]
pub(crate) enum Ask {
    /// An item; `None` if it need not be waited for and there is none.
    Take {
        wait: bool,
        reply: Reply<Option<Parcel>>,
    },
    Claim {
        reply: Reply<Claimed>,
    },
    /// A look at the first item.
    Peek {
        reply: Reply<Option<Item>>,
    },
}

pub(crate) type Reply<T> = oneshot::Sender<Result<T>>;

/// What became of an attempt.
#[derive(Debug)]
pub(crate) struct Settled {
    pub(crate) candidates: Vec<Candidate>,
    pub(crate) tried: Tried,
    /// Not answered yet.
    pub(crate) ask: Option<Ask>,
    /// The claim that was made.
    pub(crate) claimed: Option<Weak<Owned>>,
    /// Items were changed at this revision that were not known.
    pub(crate) unknown: Option<i64>,
}

/// What every attempt of one consumer needs.
#[derive(Debug)]
pub(crate) struct Means {
    pub(crate) core: Arc<Core>,
    pub(crate) keys: Arc<Keys>,
    /// How often an item may be claimed.
    pub(crate) max_attempts: Option<u32>,
    /// How long a claim may last.
    pub(crate) time_limit: Option<Duration>,
    /// Where parcels go that nobody opened.
    pub(crate) returns: UnboundedSender<Item>,
}

impl Ask {
    pub(crate) fn is_closed(&self) -> bool {
        match self {
            Ask::Take { reply, .. } => reply.is_closed(),
            Ask::Claim { reply } => reply.is_closed(),
            Ask::Peek { reply } => reply.is_closed(),
        }
    }

    /// Whether whoever asks wants to know now.
    pub(crate) fn is_urgent(&self) -> bool {
        matches!(self, Ask::Take { wait: false, .. } | Ask::Peek { .. })
    }

    pub(crate) fn fail(self, error: Error) {
        // Whoever is gone is not told.
        match self {
            Ask::Take { reply, .. } => drop(reply.send(Err(error))),
            Ask::Claim { reply } => drop(reply.send(Err(error))),
            Ask::Peek { reply } => drop(reply.send(Err(error))),
        }
    }

    /// Answers an urgent ask: there is nothing.
    pub(crate) fn nothing(self) {
        match self {
            Ask::Take { reply, .. } => drop(reply.send(Ok(None))),
            Ask::Peek { reply } => drop(reply.send(Ok(None))),
            Ask::Claim { .. } => {}
        }
    }
}

impl Settled {
    fn new(candidates: Vec<Candidate>, tried: Tried, ask: Option<Ask>) -> Self {
        Self { candidates, tried, ask, claimed: None, unknown: None }
    }
}

impl Means {
    /// Takes the first of the candidates that is still there.
    pub(crate) async fn take(
        self: Arc<Self>,
        wait: bool,
        reply: Reply<Option<Parcel>>,
        of: Vec<Candidate>,
    ) -> Settled {
        match self.try_take(&of).await {
            Ok(Some((index, value))) => {
                let entry = &of[index].entry;
                let item = Item { key: entry.key.clone(), value, create_revision: entry.create_revision };
                let _ = reply.send(Ok(Some(Parcel::new(item, self.returns.clone()))));
                Settled::new(of, Tried::Took(index), None)
            }
            Ok(None) => Settled::new(of, Tried::All, Some(Ask::Take { wait, reply })),
            // The generation ended, and nothing was taken.
            Err(Error::Lost { .. }) => Settled::new(of, Tried::None, Some(Ask::Take { wait, reply })),
            Err(error) => {
                let _ = reply.send(Err(error));
                Settled::new(of, Tried::None, None)
            }
        }
    }

    async fn try_take(&self, of: &[Candidate]) -> Result<Option<(usize, Vec<u8>)>> {
        let Some(first) = of.first() else { return Ok(None) };
        let generation = self.core.generation().await?;
        let (keys, candidates) = (self.keys.clone(), of.to_vec());
        let body = move |record: &Record<'_>| chain::take(&keys, &candidates, record);
        let taken = self.core.once(&generation, &first.entry.key, body, |done| done).await;
        match taken {
            Ok(Done { answer: Some(answer), .. }) => Ok(chain::taken(answer)),
            Ok(Done { answer: None, revision, .. }) => self.find_taken(of, revision).await,
            Err(Error::NoSpace { .. }) => self.take_without_space(of).await,
            Err(error) => Err(error),
        }
    }

    /// Which one it was that was taken at this revision: the first that was untouched before.
    async fn find_taken(&self, of: &[Candidate], revision: i64) -> Result<Option<(usize, Vec<u8>)>> {
        let before = || GetOptions::new().with_revision(revision - 1);
        for (index, candidate) in of.iter().enumerate() {
            let key = &candidate.entry.key;
            let attempts = self.keys.attempts(self.keys.id(key));
            let gone = |_| Error::OutcomeUnknown { key: crate::name::display(key) };
            let item = self.core.rpc.get(key, before(), None).await.map_err(gone)?;
            let attempts = self.core.rpc.get(&attempts, before(), None).await.map_err(gone)?;
            let attempts = attempts.kvs().first().map_or(0, etcd_client::KeyValue::mod_revision);
            let item = item.kvs().first().filter(|kv| kv.mod_revision() == candidate.entry.mod_revision);
            if let Some(item) = item
                && attempts == candidate.attempts_revision()
            {
                return Ok(Some((index, item.value().to_vec())));
            }
        }
        Ok(None)
    }

    /// Takes without a record, since etcd takes no puts. Sent once: if there is no answer, nobody can tell.
    async fn take_without_space(&self, of: &[Candidate]) -> Result<Option<(usize, Vec<u8>)>> {
        let Some((first, txn)) = of.first().zip(chain::take_unrecorded(&self.keys, of)) else {
            return Ok(None);
        };
        let key = &first.entry.key;
        match self.core.rpc.txn(key, txn).await {
            Ok(answer) => Ok(chain::taken_unrecorded(answer.0)),
            Err(failure) => Err(failure.for_good(key)),
        }
    }

    /// Claims the first of the candidates that is still there and free.
    pub(crate) async fn claim(self: Arc<Self>, reply: Reply<Claimed>, of: Vec<Candidate>) -> Settled {
        match self.try_claim(&of).await {
            Ok(Some((index, hold))) => {
                let claimed = Some(Arc::downgrade(hold.facts()));
                let _ = reply.send(Ok(Claimed::new(hold)));
                Settled { claimed, ..Settled::new(of, Tried::Took(index), None) }
            }
            Ok(None) => Settled::new(of, Tried::All, Some(Ask::Claim { reply })),
            // The generation ended, and with it the claim if there was one.
            Err(Error::Lost { .. } | Error::OutcomeUnknown { .. }) => {
                Settled::new(of, Tried::None, Some(Ask::Claim { reply }))
            }
            Err(error) => {
                let _ = reply.send(Err(error));
                Settled::new(of, Tried::None, None)
            }
        }
    }

    async fn try_claim(&self, of: &[Candidate]) -> Result<Option<(usize, Hold)>> {
        let Some(first) = of.first() else { return Ok(None) };
        let generation = self.core.generation().await?;
        let (keys, candidates) = (self.keys.clone(), of.to_vec());
        let who = participant::describe(&self.core);
        let body = move |record: &Record<'_>| chain::claim(&keys, &candidates, &who, record);
        let done = self.core.once(&generation, &first.entry.key, body, |done| done).await?;
        let hold = |index: usize, value| {
            let candidate = of[index].clone();
            (index, Hold::new(self, &generation, candidate, value, done.revision))
        };
        if let Some(answer) = done.answer {
            return Ok(chain::taken(answer).map(|(index, value)| hold(index, value)));
        }
        for (index, candidate) in of.iter().enumerate() {
            let key = &candidate.entry.key;
            let claim = self.keys.claim(self.keys.id(key));
            let claim = self.core.rpc.get(&claim, GetOptions::new().with_keys_only(), None).await?;
            if claim.kvs().first().is_some_and(|kv| kv.create_revision() == done.revision) {
                let item = self.core.rpc.get(key, GetOptions::new(), None).await?;
                let value = item.kvs().first().map(|kv| kv.value().to_vec()).unwrap_or_default();
                return Ok(Some(hold(index, value)));
            }
        }
        Ok(None)
    }

    /// Finds out whether there is something that the view, at `revision`, does not show yet.
    pub(crate) async fn look_for_more(self: Arc<Self>, ask: Ask, revision: i64) -> Settled {
        let options = GetOptions::new()
            .with_range(self.keys.items.end())
            .with_keys_only()
            .with_min_mod_revision(revision + 1);
        let mut settled = Settled::new(Vec::new(), Tried::All, None);
        match self.core.rpc.get(self.keys.items.as_bytes(), options, None).await {
            Ok(found) => match found.kvs().iter().map(etcd_client::KeyValue::mod_revision).max() {
                Some(newest) => (settled.unknown, settled.ask) = (Some(newest), Some(ask)),
                None => ask.nothing(),
            },
            Err(error) => ask.fail(error),
        }
        settled
    }

    /// Looks at an item.
    pub(crate) async fn peek(self: Arc<Self>, reply: Reply<Option<Item>>, key: Vec<u8>) -> Settled {
        const PAUSE: Duration = Duration::from_millis(5);
        let mut settled = Settled::new(Vec::new(), Tried::All, None);
        match self.core.rpc.get(&key, GetOptions::new(), None).await {
            Ok(found) => match found.kvs().first() {
                Some(kv) => {
                    let (value, create_revision) = (kv.value().to_vec(), kv.create_revision());
                    let _ = reply.send(Ok(Some(Item { key, value, create_revision })));
                }
                None => {
                    // Gone meanwhile, which the view will say in a moment.
                    tokio::time::sleep(PAUSE).await;
                    settled.ask = Some(Ask::Peek { reply });
                }
            },
            Err(error) => drop(reply.send(Err(error))),
        }
        settled
    }

    /// Puts an item that was claimed too often among the dead letters.
    pub(crate) async fn bury(self: Arc<Self>, candidate: Candidate) -> Settled {
        let attempts = candidate.attempts();
        let key = crate::name::display(&candidate.entry.key);
        match self.try_bury(&candidate).await {
            Ok(()) => tracing::warn!(key, attempts, "given up after its last attempt"),
            Err(error) => tracing::warn!(key, attempts, %error, "cannot be given up"),
        }
        Settled::new(vec![candidate], Tried::All, None)
    }

    async fn try_bury(&self, candidate: &Candidate) -> Result<()> {
        let (keys, candidate) = (self.keys.clone(), candidate.clone());
        let key = candidate.entry.key.clone();
        let found = self.core.rpc.get(&key, GetOptions::new(), None).await?;
        let Some(value) = found.kvs().first().map(|kv| kv.value().to_vec()) else { return Ok(()) };
        let why = dead::why(
            "claimed as often as it may be, and never acked",
            candidate.attempts(),
            self.core.runtime.wall_seconds(),
        );
        let generation = self.core.generation().await?;
        let body = move |record: &Record<'_>| dead::bury(&keys, &candidate, &value, &why, record);
        self.core.once(&generation, &key, body, |_| ()).await
    }

    /// Puts an item back that was taken for somebody who is gone.
    pub(crate) async fn put_back(self: Arc<Self>, item: Item) {
        use etcd_client::{Compare, CompareOp, Txn, TxnOp};
        let key = item.key.clone();
        let body = move |record: &Record<'_>| {
            let absent = Compare::create_revision(item.key.clone(), CompareOp::Equal, 0);
            Txn::new()
                .when([absent])
                .and_then([TxnOp::put(item.key.clone(), item.value.clone(), None), record.put("back")])
                .or_else([record.put("not")])
        };
        let Ok(generation) = self.core.generation().await else { return };
        if let Err(error) = self.core.once(&generation, &key, body, |_| ()).await {
            let key = crate::name::display(&key);
            tracing::warn!(key, %error, "an item taken for a call that was dropped is lost");
        }
    }

    /// Whether the item was claimed as often as it may be.
    pub(crate) fn is_exhausted(&self, candidate: &Candidate) -> bool {
        self.max_attempts.is_some_and(|most| candidate.attempts() >= most)
    }
}
