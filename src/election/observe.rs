//! Following who leads.

use std::pin::Pin;
use std::task::{Context, Poll};

use futures::Stream;
use futures::stream::{BoxStream, StreamExt};

use super::Leader;
use crate::error::{Error, Result};
use crate::name;
use crate::session::Session;
use crate::session::view::{Values, View};

/// Who led at one revision.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Observation {
    /// A revision of etcd at which this was true.
    pub revision: i64,
    /// The leader, or `None` when there was none.
    pub leader: Option<Leader>,
}

/// The stream of [`Election::observe`](super::Election::observe).
#[must_use = "a stream does nothing unless polled"]
pub struct Observe {
    observations: BoxStream<'static, Result<Observation>>,
}

impl Observe {
    pub(super) fn new(session: Session, prefix: name::Prefix) -> Self {
        Self { observations: observations(session, prefix).boxed() }
    }
}

impl Stream for Observe {
    type Item = Result<Observation>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.observations.poll_next_unpin(cx)
    }
}

impl std::fmt::Debug for Observe {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Observe").finish_non_exhaustive()
    }
}

/// What an observer is doing.
enum Watching {
    Opening,
    Following(Box<View>, Option<Leader>),
}

fn observations(session: Session, prefix: name::Prefix) -> impl Stream<Item = Result<Observation>> {
    // No state: the stream has ended.
    futures::stream::unfold(Some(Watching::Opening), move |state| {
        let (session, prefix) = (session.clone(), prefix.clone());
        async move {
            let state = state?;
            let stepped = tokio::select! {
                biased;
                () = session.closing() => Err(Error::Closed),
                stepped = step(state, &session, prefix) => stepped,
            };
            Some(match stepped {
                Ok((observation, state)) => (Ok(observation), Some(state)),
                Err(error) => (Err(error), None),
            })
        }
    })
}

/// Goes on to the next report.
async fn step(state: Watching, session: &Session, prefix: name::Prefix) -> Result<(Observation, Watching)> {
    let (mut view, reported) = match state {
        Watching::Opening => {
            (Box::new(View::open(session.core().clone(), prefix, Values::Keep).await?), None)
        }
        Watching::Following(mut view, leader) => {
            view.next().await?;
            (view, Some(leader))
        }
    };
    loop {
        let leader = first(&view);
        if reported.as_ref() != Some(&leader) {
            let observation = Observation { revision: view.revision(), leader: leader.clone() };
            return Ok((observation, Watching::Following(view, leader)));
        }
        view.next().await?;
    }
}

fn first(view: &View) -> Option<Leader> {
    let entry = view.entries().min_by_key(|entry| (entry.create_revision, &entry.key))?;
    let (key, value) = (entry.key.clone(), entry.value.clone());
    Some(Leader { key, value, create_revision: entry.create_revision, lease: entry.lease })
}
