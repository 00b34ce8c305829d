//! Bodies that know more than their bytes.

use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};

use http_body::{Frame, SizeHint};
use tonic::Status;
use tonic::body::Body;
use tonic::codegen::Bytes;

use super::peer::Peer;
use crate::service::Pick;

/// The body of a request, to be taken back as long as nobody has read of it.
pub(super) struct Unsent(Arc<Mutex<Option<Body>>>);

impl Unsent {
    /// The handle, and the body to send.
    pub(super) fn new(body: Body) -> (Self, Body) {
        let shared = Arc::new(Mutex::new(Some(body)));
        (Self(shared.clone()), Body::new(Sent { shared, body: None }))
    }

    /// The whole body; `None` if some of it may have been sent.
    pub(super) fn take(self) -> Option<Body> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

struct Sent {
    shared: Arc<Mutex<Option<Body>>>,
    body: Option<Body>,
}

impl http_body::Body for Sent {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        if self.body.is_none() {
            let body = self.shared.lock().unwrap_or_else(PoisonError::into_inner).take();
            self.body = body;
        }
        match &mut self.body {
            Some(body) => Pin::new(body).poll_frame(context),
            None => Poll::Ready(None),
        }
    }

    fn is_end_stream(&self) -> bool {
        match &self.body {
            Some(body) => body.is_end_stream(),
            None => {
                let waiting = self.shared.lock().unwrap_or_else(PoisonError::into_inner);
                waiting.as_ref().is_none_or(|body| body.is_end_stream())
            }
        }
    }

    fn size_hint(&self) -> SizeHint {
        self.body.as_ref().map(|body| body.size_hint()).unwrap_or_default()
    }
}

/// The body of an answer: the call is pending until it was read or dropped.
pub(super) struct Counted {
    body: Body,
    call: Option<(Pick, Arc<Peer>, u64)>,
}

impl Counted {
    pub(super) fn body(body: Body, pick: Pick, peer: Arc<Peer>, connection: u64) -> Body {
        Body::new(Self { body, call: Some((pick, peer, connection)) })
    }
}

impl http_body::Body for Counted {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let frame = Pin::new(&mut self.body).poll_frame(context);
        match &frame {
            Poll::Ready(None) => self.call = None,
            Poll::Ready(Some(Err(_))) => {
                // The connection has broken; the next call shall not have to find out.
                if let Some((pick, peer, connection)) = self.call.take() {
                    peer.disconnect(connection);
                    pick.failed();
                }
            }
            _ => {}
        }
        frame
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
