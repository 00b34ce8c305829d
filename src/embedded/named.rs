//! Methods that a service does not have: refused in etcd's words, about which the generated services say nothing.

use std::convert::Infallible;
use std::task::{Context, Poll};

use futures::future::BoxFuture;
use tonic::body::Body;
use tonic::server::NamedService;
use tonic::{Code, Status};
use tower::Service;

type Request = http::Request<Body>;
type Response = http::Response<Body>;

/// A service that says which of its methods is none.
#[derive(Debug, Clone)]
pub(super) struct Named<S>(pub(super) S);

impl<S: NamedService> NamedService for Named<S> {
    const NAME: &'static str = S::NAME;
}

impl<S> Service<Request> for Named<S>
where
    S: Service<Request, Response = Response, Error = Infallible>,
    S::Future: Send + 'static,
{
    type Response = Response;
    type Error = Infallible;
    type Future = BoxFuture<'static, Result<Response, Infallible>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        self.0.poll_ready(cx)
    }

    fn call(&mut self, request: Request) -> Self::Future {
        let uri = request.uri().clone();
        let answer = self.0.call(request);
        Box::pin(async move {
            let response = answer.await?;
            Ok(if is_wordless(&response) { unknown(uri.path()).into_http() } else { response })
        })
    }
}

/// Whether it is what a generated service says to a method that is none. All our own refusals have words.
fn is_wordless(response: &Response) -> bool {
    Status::from_header_map(response.headers())
        .is_some_and(|status| status.code() == Code::Unimplemented && status.message().is_empty())
}

/// What etcd says of a method that it does not have.
pub(super) fn unknown(path: &str) -> Status {
    let (service, method) = path.trim_start_matches('/').rsplit_once('/').unwrap_or_default();
    Status::unimplemented(format!("unknown method {method} for service {service}"))
}
