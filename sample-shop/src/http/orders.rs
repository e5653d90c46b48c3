//! Orders, returns, supplies and closings over HTTP. Each is accepted once per idempotency key, and can be read by its
//! id.

use std::{borrow::Borrow, sync::Arc, time::Duration};

use annals::{Aggregate, Event, EventStore, ExecuteError, Recorded, Repository, StreamId, Version};
use axum::{
    Json, Router,
    extract::State,
    http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
    routing::{get, post},
};
use chrono::{DateTime, Utc};
use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use serde::Serialize;
use serde_json::{Value, json};

use super::{
    asked::{HandedIn, Id, Wait, asked, id, order_lines, sku, wait},
    follower::Whole,
    metrics::Metrics,
    problem::{Problem, without_files},
    sagas::{Sagas, Watch},
};
use crate::{
    api::{ClosingView, NewOrder, NewReturn, NewSupply, OrderView, REPLAYED, ReturnView, SagaView, SupplyView},
    closing::{ClosingCommand, ClosingEvent},
    order::{BY_CUSTOMER, Order, OrderCommand, OrderEvent, OrderRefusal, ReturnCommand, ReturnEvent},
    shop::Counter,
    supply::SupplyEvent,
};

/// The maximum number of events read per order, return, supply or closing. In practice there are at most three.
const EVENTS_MAX: usize = 100;

/// Events, each with the time at which it was recorded.
type History<E> = Vec<(DateTime<Utc>, E)>;

/// The public API of the order service.
pub struct Front {
    pub store: Arc<dyn EventStore>,
    pub counter: Counter,
    pub sagas: Sagas,
    pub metrics: Arc<Metrics>,
    /// The store URL and the bus URL, without passwords, which closings report.
    pub kept_in: (String, String),
}

/// An accepted paper.
struct Taken<'f, E> {
    /// The first event of the paper, written by this request or by an earlier one.
    first: E,
    repeated: bool,
    /// Present if the request waits. The watch started before the paper was accepted.
    watch: Option<Watch<'f>>,
}

/// Returns the routes.
pub fn routes(front: Front) -> Router {
    Router::new()
        .route("/orders", post(place))
        .route("/orders/{id}", get(order))
        .route("/orders/{id}/cancel", post(cancel))
        .route("/returns", post(open_return))
        .route("/returns/{id}", get(returned))
        .route("/supplies", post(supply))
        .route("/supplies/{id}", get(supplied))
        .route("/closings", post(open_closing))
        .route("/closings/{id}", get(closing))
        .with_state(Arc::new(front))
}

async fn place(State(front): State<Arc<Front>>, handed_in: HandedIn) -> Result<Response, Problem> {
    let order: NewOrder = handed_in.body()?;
    order_lines(order.customer.as_deref(), &order.lines)?;
    let NewOrder { customer, lines, card } = order.clone();
    let place = OrderCommand::Place { order_id: handed_in.id.clone(), customer, lines, card };
    let taken = front.take_in(&front.counter.orders, "checkout", &handed_in, place).await?;
    let OrderEvent::Placed { customer, lines, card, total, currency, .. } = taken.first else {
        return Err(other_body());
    };
    if order != (NewOrder { customer, lines, card }) {
        return Err(other_body());
    }
    let id = &handed_in.id;
    let receipt = json!({"order_id": id, "total": total, "currency": currency});
    let view = taken.watch.map(|watch| order_view(&front, id, watch, !taken.repeated));
    Ok(taken_in("orders", id, taken.repeated, receipt, view).await)
}

async fn open_return(State(front): State<Arc<Front>>, handed_in: HandedIn) -> Result<Response, Problem> {
    let returned: NewReturn = handed_in.body()?;
    order_lines(returned.customer.as_deref(), &returned.lines)?;
    let NewReturn { customer, lines } = returned.clone();
    let open = ReturnCommand::Open { return_id: handed_in.id.clone(), customer, lines };
    let taken = front.take_in(&front.counter.returns, "return", &handed_in, open).await?;
    let ReturnEvent::Opened { customer, lines, total, currency, .. } = taken.first else { return Err(other_body()) };
    if returned != (NewReturn { customer, lines }) {
        return Err(other_body());
    }
    let id = &handed_in.id;
    let receipt = json!({"return_id": id, "total": total, "currency": currency});
    let view = taken.watch.map(|watch| return_view(&front, id, watch, !taken.repeated));
    Ok(taken_in("returns", id, taken.repeated, receipt, view).await)
}

async fn supply(State(front): State<Arc<Front>>, handed_in: HandedIn) -> Result<Response, Problem> {
    let (delivered, units) = match handed_in.body()? {
        NewSupply::Delivered(units) => (true, units),
        NewSupply::Adjusted(units) => (false, units),
    };
    units.iter().try_for_each(|change| sku(&change.sku))?;
    let supply = SupplyEvent::new(handed_in.id.clone(), delivered, units);
    let taken = front.take_in(&front.counter.supplies, "supply", &handed_in, supply.clone()).await?;
    if taken.first != supply {
        return Err(other_body());
    }
    let id = &handed_in.id;
    let view = taken.watch.map(|watch| supply_view(&front, id, watch, !taken.repeated));
    Ok(taken_in("supplies", id, taken.repeated, json!({"supply_id": id}), view).await)
}

async fn open_closing(State(front): State<Arc<Front>>, handed_in: HandedIn) -> Result<Response, Problem> {
    let open = ClosingCommand::Open { closing_id: handed_in.id.clone() };
    let taken = front.take_in(&front.counter.closings, "closing", &handed_in, open).await?;
    let id = &handed_in.id;
    let view = taken.watch.map(|watch| closing_view(&front, id, watch, !taken.repeated));
    Ok(taken_in("closings", id, taken.repeated, json!({"closing_id": id}), view).await)
}

async fn cancel(State(front): State<Arc<Front>>, order: Id, headers: HeaderMap) -> Result<Response, Problem> {
    let order_id = id(order)?;
    // The cancellation is a request of its own, with an id different from the request that placed the order. A repeated
    // cancellation finds the order cancelled.
    let request = asked("cancel", &order_id, &headers);
    let cancel = OrderCommand::Cancel { reason: BY_CUSTOMER.into() };
    match front.counter.orders.execute(&order_id, cancel, request).await {
        Ok(_) => {}
        Err(ExecuteError::Refused(OrderRefusal::NotPlaced)) => return Err(unknown("order", &order_id)),
        Err(ExecuteError::Refused(refusal)) => return Err(Problem::new(StatusCode::CONFLICT, refusal.to_string())),
        Err(error) => return Err(problem(error)),
    }
    let state = front.counter.orders.state(&order_id).await;
    match state.map_err(|error| Problem::unavailable(without_files(&error)))? {
        Order::Cancelled(reason) => {
            Ok(Json(json!({"order_id": order_id, "status": "cancelled", "reason": reason})).into_response())
        }
        _ => Err(Problem::unavailable("the order was not cancelled; repeat the request")),
    }
}

async fn order(State(front): State<Arc<Front>>, order: Id, time: Wait) -> Result<Json<OrderView>, Problem> {
    let (order_id, time) = (id(order)?, wait(time)?);
    let watch = front.watch(&front.counter.orders, "checkout", &order_id, time)?;
    order_view(&front, &order_id, watch, false).await.map(Json)
}

async fn order_view(front: &Front, order_id: &str, watch: Watch<'_>, is_new: bool) -> Result<OrderView, Problem> {
    let (events, saga) = front.look(&front.counter.orders, order_id, watch, is_new).await?;
    let mut events = events.into_iter();
    let Some((placed_at, OrderEvent::Placed { customer, lines, total, currency, .. })) = events.next() else {
        return Err(unknown("order", order_id));
    };
    let (mut status, mut reason) = ("placed", None);
    for (_, event) in events {
        match event {
            OrderEvent::Placed { .. } => {}
            OrderEvent::Confirmed { .. } => status = "confirmed",
            OrderEvent::Cancelled { reason: why, .. } => (status, reason) = ("cancelled", Some(why)),
        }
    }
    let status = status.to_owned();
    Ok(OrderView { order_id: order_id.to_owned(), status, reason, customer, lines, total, currency, placed_at, saga })
}

async fn returned(State(front): State<Arc<Front>>, returned: Id, time: Wait) -> Result<Json<ReturnView>, Problem> {
    let (return_id, time) = (id(returned)?, wait(time)?);
    let watch = front.watch(&front.counter.returns, "return", &return_id, time)?;
    return_view(&front, &return_id, watch, false).await.map(Json)
}

async fn return_view(front: &Front, return_id: &str, watch: Watch<'_>, is_new: bool) -> Result<ReturnView, Problem> {
    let (events, saga) = front.look(&front.counter.returns, return_id, watch, is_new).await?;
    let mut events = events.into_iter();
    let Some((opened_at, ReturnEvent::Opened { customer, lines, total, currency, .. })) = events.next() else {
        return Err(unknown("return", return_id));
    };
    let completed = events.any(|(_, event)| matches!(event, ReturnEvent::Completed { .. }));
    let status = if completed { "completed" } else { "opened" }.to_owned();
    Ok(ReturnView { return_id: return_id.to_owned(), status, customer, lines, total, currency, opened_at, saga })
}

async fn supplied(State(front): State<Arc<Front>>, supply: Id, time: Wait) -> Result<Json<SupplyView>, Problem> {
    let (supply_id, time) = (id(supply)?, wait(time)?);
    let watch = front.watch(&front.counter.supplies, "supply", &supply_id, time)?;
    supply_view(&front, &supply_id, watch, false).await.map(Json)
}

async fn supply_view(front: &Front, supply_id: &str, watch: Watch<'_>, is_new: bool) -> Result<SupplyView, Problem> {
    let (events, saga) = front.look(&front.counter.supplies, supply_id, watch, is_new).await?;
    let supply = match events.into_iter().next() {
        Some((_, SupplyEvent::Delivered { units, .. })) => NewSupply::Delivered(units),
        Some((_, SupplyEvent::Adjusted { units, .. })) => NewSupply::Adjusted(units),
        None => return Err(unknown("supply", supply_id)),
    };
    Ok(SupplyView { supply_id: supply_id.to_owned(), supply, saga })
}

async fn closing(State(front): State<Arc<Front>>, closing: Id, time: Wait) -> Result<Json<ClosingView>, Problem> {
    let (closing_id, time) = (id(closing)?, wait(time)?);
    let watch = front.watch(&front.counter.closings, "closing", &closing_id, time)?;
    closing_view(&front, &closing_id, watch, false).await.map(Json)
}

async fn closing_view(front: &Front, closing_id: &str, watch: Watch<'_>, is_new: bool) -> Result<ClosingView, Problem> {
    let (events, saga) = front.look(&front.counter.closings, closing_id, watch, is_new).await?;
    let books = events.into_iter().find_map(|(_, event)| match event {
        ClosingEvent::Closed { books, .. } => Some(books),
        ClosingEvent::Opened { .. } => None,
    });
    let (store, bus) = front.kept_in.clone();
    Ok(ClosingView { closing_id: closing_id.to_owned(), books, store, bus, saga })
}

impl Front {
    /// Watches the paper with this id and its saga with this name, for the given time.
    fn watch<A: Aggregate>(
        &self,
        papers: &Repository<A>,
        saga: &str,
        id: &str,
        wait: Duration,
    ) -> Result<Watch<'_>, Problem> {
        self.sagas.watch(saga, stream(papers, id)?, wait)
    }

    /// Accepts a paper under its id. If an earlier paper has the same id, returns the earlier paper, so that the caller
    /// can compare them.
    async fn take_in<A: Aggregate<Event: Clone>>(
        &self,
        papers: &Repository<A>,
        saga: &str,
        HandedIn { id, wait, headers, .. }: &HandedIn,
        command: A::Command,
    ) -> Result<Taken<'_, A::Event>, Problem> {
        let watch = (!wait.is_zero()).then(|| self.watch(papers, saga, id, *wait)).transpose()?;
        let decided = papers.create(id, command, asked(A::CATEGORY, id, headers)).await.map_err(problem)?;
        let repeated = decided.repeated || decided.events.is_empty();
        if !repeated {
            self.metrics.taken_in(A::CATEGORY);
        }
        let first = match decided.events.into_iter().next() {
            Some(first) => Some(first),
            // Another command has accepted the paper before.
            None => self.events(papers, id).await?.into_iter().next().map(|(_, event)| event),
        };
        first.map(|first| Taken { first, repeated, watch }).ok_or_else(other_body)
    }

    /// Returns the paper with this id and its saga, once the saga has settled or the watch is over. The paper is never
    /// older than the saga. If the paper is new since the watch began, waits for the signal that the saga has ended
    /// before reading either.
    async fn look<A: Aggregate>(
        &self,
        papers: &Repository<A>,
        id: &str,
        watch: Watch<'_>,
        is_new: bool,
    ) -> Result<(History<A::Event>, Option<SagaView>), Problem> {
        let mut told = is_new && watch.end().await;
        loop {
            if told && let Some(Whole { saga, paper }) = watch.whole() {
                let view = watch.view_of(&saga)?;
                if view.as_ref().is_some_and(SagaView::has_settled) {
                    return Ok((decoded(&paper)?, view));
                }
            }
            // Reads both from the store concurrently.
            let (events, view) = tokio::join!(self.events(papers, id), watch.view());
            let (events, mut view) = (events?, view?);
            let has_settled = view.as_ref().is_some_and(SagaView::has_settled);
            if has_settled && told {
                return Ok((events, view));
            }
            if !has_settled && !watch.is_over() {
                told = watch.end().await;
                if told {
                    continue;
                }
                view = watch.view().await?;
            }
            return Ok((self.events(papers, id).await?, view));
        }
    }

    async fn events<A: Aggregate>(&self, papers: &Repository<A>, id: &str) -> Result<History<A::Event>, Problem> {
        let stream = stream(papers, id)?;
        let recorded = self.store.read_stream(&stream, Version::START, EVENTS_MAX).await;
        let events = decoded(&recorded.map_err(|error| Problem::unavailable(without_files(&error)))?)?;
        if events.is_empty() { Err(unknown(A::CATEGORY, id)) } else { Ok(events) }
    }
}

fn stream<A: Aggregate>(papers: &Repository<A>, id: &str) -> Result<StreamId, Problem> {
    papers.stream(id).map_err(|error| Problem::new(StatusCode::BAD_REQUEST, error.to_string()))
}

fn decoded<E: Event>(recorded: &[impl Borrow<Recorded>]) -> Result<History<E>, Problem> {
    let mut events = Vec::with_capacity(recorded.len());
    for event in recorded.iter().map(Borrow::borrow) {
        let decoded = event.decode::<E>();
        let decoded =
            decoded.map_err(|error| Problem::new(StatusCode::INTERNAL_SERVER_ERROR, without_files(&error)))?;
        events.extend(decoded.map(|decoded| (event.recorded_at, decoded)));
    }
    Ok(events)
}

fn unknown(what: &str, id: &str) -> Problem {
    Problem::new(StatusCode::NOT_FOUND, format!("there is no {what} {id}"))
}

fn other_body() -> Problem {
    let detail = "this Idempotency-Key was used before with another body: a new request needs a new key";
    Problem::new(StatusCode::UNPROCESSABLE_ENTITY, detail)
}

fn problem<R: std::error::Error>(error: ExecuteError<R>) -> Problem {
    let detail = without_files(&error);
    match error {
        ExecuteError::Refused(refusal) => Problem::new(StatusCode::UNPROCESSABLE_ENTITY, refusal.to_string()),
        ExecuteError::Invalid(_) => Problem::new(StatusCode::UNPROCESSABLE_ENTITY, detail),
        ExecuteError::Undecodable(_) => Problem::new(StatusCode::INTERNAL_SERVER_ERROR, detail),
        ExecuteError::Contended { .. } | ExecuteError::Overloaded { .. } | ExecuteError::Unavailable(_) => {
            Problem::unavailable(detail)
        }
    }
}

/// Builds the answer to the first request and to each repeat; they differ only in one header. The body is a view if the
/// request waits, or a receipt. If the view cannot be read, the receipt confirms that the paper was accepted.
async fn taken_in<V: Serialize>(
    resource: &str,
    id: &str,
    repeated: bool,
    receipt: Value,
    view: Option<impl Future<Output = Result<V, Problem>>>,
) -> Response {
    let mut response = match view {
        Some(view) => match view.await {
            Ok(view) => Json(view).into_response(),
            Err(_) => Json(receipt).into_response(),
        },
        None => Json(receipt).into_response(),
    };
    *response.status_mut() = StatusCode::CREATED;
    let location = format!("/{resource}/{}", utf8_percent_encode(id, NON_ALPHANUMERIC));
    if let Ok(location) = HeaderValue::from_str(&location) {
        response.headers_mut().insert(header::LOCATION, location);
    }
    if repeated {
        response.headers_mut().insert(HeaderName::from_static(REPLAYED), HeaderValue::from_static("true"));
    }
    response
}
