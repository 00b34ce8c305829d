//! gRPC messages as raw bytes: taking them out of HTTP bodies and putting them back.

use futures::Stream;
use http::{Request, Response};
use tokio_util::bytes::{Buf as _, BufMut as _, Bytes};
use tonic::Status;
use tonic::body::Body;
use tonic::codec::{
    DecodeBuf, Decoder, EncodeBody, EncodeBuf, Encoder, SingleMessageCompressionOverride, Streaming,
};

/// A codec that leaves messages as they are.
#[derive(Debug, Clone, Copy)]
struct Raw;

impl Encoder for Raw {
    type Item = Bytes;
    type Error = Status;

    fn encode(&mut self, item: Bytes, buffer: &mut EncodeBuf<'_>) -> Result<(), Status> {
        buffer.put(item);
        Ok(())
    }
}

impl Decoder for Raw {
    type Item = Bytes;
    type Error = Status;

    fn decode(&mut self, buffer: &mut DecodeBuf<'_>) -> Result<Option<Bytes>, Status> {
        Ok(Some(buffer.copy_to_bytes(buffer.remaining())))
    }
}

/// The messages of a request.
pub(super) fn request_messages(body: Body) -> Streaming<Bytes> {
    Streaming::new_request(Raw, body, None, Some(usize::MAX))
}

/// The messages of an answer that is not an error by its headers alone.
pub(super) fn answer_messages(answer: Response<Body>) -> Streaming<Bytes> {
    let status = answer.status();
    Streaming::new_response(Raw, answer.into_body(), status, None, Some(usize::MAX))
}

/// A request body of these messages.
pub(super) fn request_body(messages: impl Stream<Item = Result<Bytes, Status>> + Send + 'static) -> Body {
    Body::new(EncodeBody::new_client(Raw, messages, None, Some(usize::MAX)))
}

/// An answer body of these messages, with the status in its trailers.
pub(super) fn answer_body(messages: impl Stream<Item = Result<Bytes, Status>> + Send + 'static) -> Body {
    let compression = SingleMessageCompressionOverride::default();
    Body::new(EncodeBody::new_server(Raw, messages, None, compression, Some(usize::MAX)))
}

/// A request with the same head and this one message.
pub(super) fn unary_request(head: http::request::Parts, message: Bytes) -> Request<Body> {
    Request::from_parts(head, request_body(futures::stream::once(std::future::ready(Ok(message)))))
}

/// The status of an answer that is one by its headers alone.
pub(super) fn status_in_head(answer: &Response<Body>) -> Option<Status> {
    Status::from_header_map(answer.headers())
}

/// The one message of an answer.
pub(super) async fn unary_answer(answer: Response<Body>) -> Result<Bytes, Status> {
    if let Some(status) = status_in_head(&answer) {
        return Err(status);
    }
    let mut messages = answer_messages(answer);
    let message = messages.message().await?.ok_or_else(|| Status::internal("an answer without message"))?;
    // The status comes after the message.
    while messages.message().await?.is_some() {}
    Ok(message)
}
