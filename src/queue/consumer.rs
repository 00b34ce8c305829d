//! The consumer of a queue: a task that follows the queue and serves who asks for items, in order of asking.
//!
//! It keeps two views: of the items, without their values, and of what consumers note about them. So it knows what is to
//! be had, and asks etcd only to take or claim: the cost of an item does not depend on the length of the queue.

mod task;

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio_util::sync::{CancellationToken, DropGuard};

use self::task::Task;
use super::attempt::{Ask, Means};
use super::item::Item;
use super::keys::Keys;
use crate::session::Core;
use crate::session::view::{Values, View};

/// A handle on the task, which ends with it.
#[derive(Debug)]
pub(crate) struct Consumer {
    asks: UnboundedSender<Ask>,
    _abandoned: DropGuard,
}

impl Consumer {
    pub(crate) fn start(
        core: &Arc<Core>,
        keys: &Arc<Keys>,
        max_attempts: Option<u32>,
        time_limit: Option<Duration>,
    ) -> Self {
        let (asks, inbox) = unbounded_channel();
        let (returns, returned) = unbounded_channel();
        let (core, keys, abandoned) = (core.clone(), keys.clone(), CancellationToken::new());
        let means = Arc::new(Means { core: core.clone(), keys, max_attempts, time_limit, returns });
        core.runtime.spawn(wait_for_work(means, inbox, returned, abandoned.clone()));
        Self { asks, _abandoned: abandoned.drop_guard() }
    }

    /// The answer never comes if the session is closed.
    pub(crate) fn ask(&self, ask: Ask) {
        let _ = self.asks.send(ask);
    }
}

/// Opens the views when they are needed for the first time, and follows them.
async fn wait_for_work(
    means: Arc<Means>,
    mut inbox: UnboundedReceiver<Ask>,
    returned: UnboundedReceiver<Item>,
    abandoned: CancellationToken,
) {
    let core = means.core.clone();
    loop {
        let ask = tokio::select! {
            biased;
            () = core.closing.cancelled() => return,
            ask = inbox.recv() => ask,
        };
        let Some(ask) = ask else { return };
        let opened = async {
            tokio::try_join!(
                View::open(core.clone(), means.keys.items.clone(), Values::Drop),
                View::open(core.clone(), means.keys.work.clone(), Values::Keep),
            )
        };
        let opened = tokio::select! {
            biased;
            () = core.closing.cancelled() => return,
            () = abandoned.cancelled() => return,
            opened = opened => opened,
        };
        match opened {
            Ok(views) => {
                let task = Task::new(means, inbox, returned, ask, views);
                return task.run().await;
            }
            Err(error) => ask.fail(error),
        }
    }
}
