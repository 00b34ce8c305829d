//! Cancellation at every await point: futures dropped after a chosen number of polls.

use std::pin::pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Wake, Waker};

/// Polls a future exactly `polls` times, each when it was woken, and drops it right after the last one. Its
/// output if it completed by then. With 0 it is dropped unpolled.
pub(crate) async fn drop_after_polls<F: Future>(polls: usize, future: F) -> Option<F::Output> {
    run(polls, future, false).await
}

/// Polls a future exactly `polls` times (at least once) and drops it when it is woken the next time: what it
/// waited for has come, and it does not get to look. Its output if it completed before.
pub(crate) async fn drop_when_woken<F: Future>(polls: usize, future: F) -> Option<F::Output> {
    assert!(polls > 0, "a future that was never polled is never woken");
    run(polls, future, true).await
}

/// Makes a future again and again, dropping it after 0, 1, 2, … polls, until one completes. After each drop
/// `check` is awaited with the number of polls. Returns the output and the number of polls it took.
pub(crate) async fn cancel_at_every_poll<F: Future>(
    mut make: impl FnMut() -> F,
    mut check: impl AsyncFnMut(usize),
) -> (F::Output, usize) {
    for polls in 0..10_000 {
        if let Some(output) = drop_after_polls(polls, make()).await {
            return (output, polls);
        }
        check(polls).await;
    }
    panic!("the future does not complete in 10,000 polls");
}

async fn run<F: Future>(polls: usize, future: F, until_woken: bool) -> Option<F::Output> {
    let mut future = pin!(future);
    let signal = Arc::new(Signal { woken: AtomicBool::new(true), outer: Mutex::new(Waker::noop().clone()) });
    let waker = Waker::from(signal.clone());
    let mut left = polls;
    let outcome = std::future::poll_fn(move |context| {
        if left == 0 && !until_woken {
            return Poll::Ready(None);
        }
        // The outer task may be polled for other reasons; only the future's own wakes count. The outer waker
        // is in place before the look, so no wake is missed.
        signal.outer.lock().unwrap().clone_from(context.waker());
        if signal.woken.swap(false, Ordering::SeqCst) {
            if left == 0 {
                return Poll::Ready(None);
            }
            left -= 1;
            if let Poll::Ready(output) = future.as_mut().poll(&mut Context::from_waker(&waker)) {
                return Poll::Ready(Some(output));
            }
            if left == 0 && !until_woken {
                return Poll::Ready(None);
            }
            if signal.woken.load(Ordering::SeqCst) {
                // It woke itself (it yields): let others run before its next poll.
                context.waker().wake_by_ref();
                return Poll::Pending;
            }
        }
        Poll::Pending
    });
    outcome.await
}

/// Remembers that the future was woken and passes it on.
struct Signal {
    woken: AtomicBool,
    outer: Mutex<Waker>,
}

impl Wake for Signal {
    fn wake(self: Arc<Self>) {
        self.woken.store(true, Ordering::SeqCst);
        let outer = self.outer.lock().unwrap().clone();
        outer.wake();
    }
}
