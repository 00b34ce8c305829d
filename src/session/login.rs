//! Tokens that are renewed: one login at a time to each member, and no more than one a second, for each costs etcd much. All
//! who need a token get the same.
//!
//! Logins run in tasks of their own. Whoever waits for one may not be polled any more, and others wait as well.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use etcd_client::Client;
use tokio::sync::watch;
use tokio::time::Instant;
use tonic::Status;

use super::runtime::Runtime;

/// After a login, the next is not for this long.
const PAUSE: Duration = Duration::from_secs(1);

/// What etcd says of a wrong password.
const WRONG_PASSWORD: &str = "etcdserver: authentication failed, invalid user ID or password";

/// What came of asking for another token.
#[derive(Debug, Clone)]
pub(crate) enum LoggedIn {
    Yes,
    /// etcd did not answer, or not now.
    No,
    /// The password is not accepted (any more).
    Refused(Status),
}

/// The logins to one member.
#[derive(Debug, Default)]
pub(crate) struct Logins(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    /// The last, and when it was over.
    last: Option<(Instant, LoggedIn)>,
    /// The outcome of one under way.
    coming: Option<watch::Receiver<Option<LoggedIn>>>,
}

impl Logins {
    /// Waits for a login that ends after `since`. `limit` bounds the time of one.
    pub(crate) async fn after(
        self: &Arc<Self>,
        since: Instant,
        client: &Client,
        limit: Duration,
        runtime: &Runtime,
    ) -> LoggedIn {
        let coming = {
            let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            match (&state.last, &state.coming) {
                (Some((at, outcome)), _) if *at > since => return outcome.clone(),
                (_, Some(coming)) => coming.clone(),
                (last, None) => {
                    let from = last.as_ref().map(|(at, _)| *at + PAUSE);
                    let (tell, coming) = watch::channel(None);
                    state.coming = Some(coming.clone());
                    runtime.spawn(self.clone().log_in(from, client.clone(), limit, tell));
                    coming
                }
            }
        };
        let mut coming = coming;
        // Without an outcome the runtime is gone.
        let outcome = coming.wait_for(Option::is_some).await.ok().and_then(|outcome| outcome.clone());
        outcome.unwrap_or(LoggedIn::No)
    }

    async fn log_in(
        self: Arc<Self>,
        from: Option<Instant>,
        client: Client,
        limit: Duration,
        tell: watch::Sender<Option<LoggedIn>>,
    ) {
        if let Some(from) = from {
            tokio::time::sleep_until(from).await;
        }
        let outcome = match tokio::time::timeout(limit, client.refresh_token()).await {
            Ok(Ok(())) => LoggedIn::Yes,
            Ok(Err(etcd_client::Error::GRpcStatus(status))) if status.message() == WRONG_PASSWORD => {
                tracing::warn!("etcd does not accept the password any more");
                LoggedIn::Refused(status)
            }
            Ok(Err(_)) | Err(_) => LoggedIn::No,
        };
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        (state.last, state.coming) = (Some((Instant::now(), outcome.clone())), None);
        tell.send_replace(Some(outcome));
    }
}
