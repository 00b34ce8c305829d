//! The snapshot over HTTP.

use std::net::SocketAddr;

use anyhow::{Context as _, Result};
use axum::Json;
use axum::Router;
use axum::extract::{Query, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use etcd_recipes::ConfigCache;
use serde::Deserialize;
use tokio::net::TcpListener;

/// Listens already.
pub(crate) struct Server(TcpListener);

#[derive(Deserialize)]
struct Wanted {
    key: Option<String>,
}

impl Server {
    pub(crate) async fn bind(address: SocketAddr) -> Result<Self> {
        let listener = TcpListener::bind(address).await;
        Ok(Self(listener.with_context(|| format!("cannot listen on {address}"))?))
    }

    pub(crate) fn address(&self) -> Result<SocketAddr> {
        Ok(self.0.local_addr()?)
    }

    pub(crate) async fn serve(self, config: ConfigCache) {
        let router = Router::new().route("/", get(show)).with_state(config);
        if let Err(error) = axum::serve(self.0, router).await {
            eprintln!("config_sync: no more HTTP: {error}");
        }
    }
}

/// The whole, or one value.
async fn show(State(config): State<ConfigCache>, Query(wanted): Query<Wanted>) -> Response {
    let stale = config.stale_since().map_or(0, |since| since.elapsed().as_secs().max(1));
    let headers = [("config-stale", stale.to_string())];
    match wanted.key {
        None => (headers, Json(config.snapshot())).into_response(),
        Some(key) => match config.get(&key) {
            Some(entry) => (headers, entry.value().to_vec()).into_response(),
            None => (StatusCode::NOT_FOUND, headers, format!("there is no key {key:?}\n")).into_response(),
        },
    }
}
