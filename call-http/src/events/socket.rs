//! Events over a WebSocket.

use std::borrow::Cow;

use axum::{
    extract::{
        Query, State, WebSocketUpgrade,
        rejection::QueryRejection,
        ws::{CloseFrame, Message, Utf8Bytes, WebSocket, close_code, rejection::WebSocketUpgradeRejection},
    },
    http::HeaderMap,
    response::Response,
};
use serde::Deserialize;
use serde_json::json;
use tokio::time::{interval, timeout};

use super::{
    following::{Following, HEARTBEAT, Piece, SLOW, SLOW_CLIENT, STOPPING, Streams},
    selection::{CREDITS, Parameters},
};
use crate::{problem::Problem, request::bad};

/// The maximum size of a message from a client, in bytes.
const MESSAGE_BYTES_MAX: usize = 4_096;

/// A message from a client.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Asked {
    credits: u32,
}

pub(super) async fn follow(
    State(streams): State<Streams>,
    parameters: Result<Query<Parameters>, QueryRejection>,
    headers: HeaderMap,
    upgrade: Result<WebSocketUpgrade, WebSocketUpgradeRejection>,
) -> Result<Response, Problem> {
    let upgrade = upgrade.map_err(|error| bad(error.body_text()))?;
    let Query(parameters) = parameters.map_err(|error| bad(error.body_text()))?;
    let credits = credits(&parameters)?;
    let following = streams.follow(&parameters, &headers).await?;
    let upgrade = upgrade.max_message_size(MESSAGE_BYTES_MAX).max_frame_size(MESSAGE_BYTES_MAX);
    let upgrade = upgrade.read_buffer_size(MESSAGE_BYTES_MAX);
    Ok(upgrade.on_upgrade(move |socket| converse(socket, following, credits)))
}

/// Returns the credits that a client starts with; `None` if the client does not limit the events.
fn credits(parameters: &Parameters) -> Result<Option<usize>, Problem> {
    let mut credits = None;
    for (_, value) in parameters.iter().filter(|(name, _)| name == CREDITS) {
        let number = value.parse::<u32>().map_err(|_| bad(format!("credits={value:.40} is not a number")))?;
        credits = Some(number as usize);
    }
    Ok(credits)
}

/// Sends events while the client has credits, and reads the client's messages, until the client or the server ends the
/// stream.
async fn converse(mut socket: WebSocket, mut following: Following, mut credits: Option<usize>) {
    let ended = following.ended();
    // Shows whether a client without credits is still there.
    let mut heartbeat = interval(HEARTBEAT);
    heartbeat.reset();
    let (code, reason) = loop {
        let left = credits.unwrap_or(usize::MAX);
        let piece = tokio::select! {
            message = socket.recv() => match message {
                None | Some(Err(_)) => return,
                Some(Ok(Message::Text(text))) => match serde_json::from_str::<Asked>(&text) {
                    Ok(Asked { credits: more }) => {
                        credits = credits.map(|credits| credits.saturating_add(more as usize));
                        continue;
                    }
                    Err(error) => break (close_code::POLICY, Cow::from(format!("not {{\"credits\": N}}: {error}"))),
                },
                Some(Ok(Message::Binary(_))) => break (close_code::UNSUPPORTED, "messages are JSON text".into()),
                // The WebSocket library answers pings and close messages itself.
                Some(Ok(Message::Ping(_) | Message::Pong(_) | Message::Close(_))) => continue,
            },
            _ = heartbeat.tick(), if left == 0 => Piece::Nothing(following.position()),
            () = ended.cancelled(), if left == 0 => break (close_code::AWAY, STOPPING.into()),
            piece = following.next(left), if left > 0 => piece,
        };
        let messages = match piece {
            Piece::Events(lines) => {
                credits = credits.map(|credits| credits.saturating_sub(lines.len()));
                lines.iter().map(|line| line.json.as_str().into()).collect()
            }
            Piece::Nothing(position) => vec![Utf8Bytes::from(json!({"position": position.0}).to_string())],
            Piece::End(reason) => break (close_code::AWAY, reason.into()),
        };
        match timeout(SLOW_CLIENT, send(&mut socket, messages)).await {
            Ok(Ok(())) => {}
            Ok(Err(_)) => return,
            Err(_) => break (close_code::POLICY, SLOW.into()),
        }
    };
    _ = timeout(SLOW_CLIENT, close(&mut socket, code, &reason)).await;
}

async fn send(socket: &mut WebSocket, messages: Vec<Utf8Bytes>) -> Result<(), axum::Error> {
    for message in messages {
        socket.send(Message::Text(message)).await?;
    }
    Ok(())
}

/// Sends the reason as a last message and in the close frame, which holds at most 123 bytes.
async fn close(socket: &mut WebSocket, code: u16, reason: &str) -> Result<(), axum::Error> {
    socket.send(Message::Text(json!({"end": reason}).to_string().into())).await?;
    let short: String = reason.chars().take(60).collect();
    socket.send(Message::Close(Some(CloseFrame { code, reason: short.into() }))).await
}
