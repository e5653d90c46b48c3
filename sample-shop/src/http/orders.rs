//! Orders, returns, supplies and closings over HTTP. Each submission is accepted once per idempotency key, and can be
//! read by its id.

use std::{borrow::Borrow, sync::Arc, time::Duration};

use annals::{Aggregate, Event, EventStore, ExecuteError, Recorded, Repository, StreamId, Version};
use annals_http::{
    Id, Problem, REPLAYED, SagaView, Sagas, Submission, Wait, Watch, Whole, asked, id, wait, without_files,
};
use axum::{
    Json, Router,
    extract::State,
    http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
    routing::{get, post},
};
use chrono::{DateTime, Utc};
use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use prometheus::IntCounterVec;
use serde::Serialize;
use serde_json::{Value, json};

use super::{
    bodies::{ClosingView, NewOrder, NewReturn, NewSupply, OrderView, ReturnView, SupplyView},
    checks::{order_lines, sku},
};
use crate::order::{
    BY_CUSTOMER, ClosingCommand, ClosingEvent, Order, OrderCommand, OrderEvent, OrderRefusal, Repositories,
    ReturnCommand, ReturnEvent, SupplyEvent, request,
};

/// The maximum number of events read per order, return, supply or closing. In practice, a stream has at most three
/// events.
const EVENTS_MAX: usize = 100;

/// Events, each with the time at which it was recorded.
type History<E> = Vec<(DateTime<Utc>, E)>;

/// The public API of the order service.
pub struct OrderApi {
    pub store: Arc<dyn EventStore>,
    pub repositories: Repositories,
    pub sagas: Sagas,
    /// Counts the accepted submissions by their kind.
    pub accepted: IntCounterVec,
    /// The store URL without its password, which closings report.
    pub store_url: String,
    /// The bus URL without its passwords, which closings report.
    pub bus_url: String,
}

/// An accepted submission.
struct Accepted<'f, E> {
    /// The first event of the submission, written by this request or by an earlier request.
    first: E,
    repeated: bool,
    /// Present if the request waits. The watch started before the submission was accepted.
    watch: Option<Watch<'f>>,
}

/// Returns the routes.
pub fn routes(api: OrderApi) -> Router {
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
        .with_state(Arc::new(api))
}

async fn place(State(api): State<Arc<OrderApi>>, submission: Submission) -> Result<Response, Problem> {
    let order: NewOrder = submission.body()?;
    order_lines(order.customer.as_deref(), &order.lines)?;
    let NewOrder { customer, lines, card } = order.clone();
    let place = OrderCommand::Place { order_id: submission.id.clone(), customer, lines, card };
    let accepted = api.accept(&api.repositories.orders, "checkout", &submission, place).await?;
    let OrderEvent::Placed { customer, lines, card, total, currency, .. } = accepted.first else {
        return Err(other_body());
    };
    if order != (NewOrder { customer, lines, card }) {
        return Err(other_body());
    }
    let id = &submission.id;
    let receipt = json!({"order_id": id, "total": total, "currency": currency});
    let view = accepted.watch.map(|watch| order_view(&api, id, watch, !accepted.repeated));
    Ok(created("orders", id, accepted.repeated, receipt, view).await)
}

async fn open_return(State(api): State<Arc<OrderApi>>, submission: Submission) -> Result<Response, Problem> {
    let returned: NewReturn = submission.body()?;
    order_lines(returned.customer.as_deref(), &returned.lines)?;
    let NewReturn { customer, lines } = returned.clone();
    let open = ReturnCommand::Open { return_id: submission.id.clone(), customer, lines };
    let accepted = api.accept(&api.repositories.returns, "return", &submission, open).await?;
    let ReturnEvent::Opened { customer, lines, total, currency, .. } = accepted.first else { return Err(other_body()) };
    if returned != (NewReturn { customer, lines }) {
        return Err(other_body());
    }
    let id = &submission.id;
    let receipt = json!({"return_id": id, "total": total, "currency": currency});
    let view = accepted.watch.map(|watch| return_view(&api, id, watch, !accepted.repeated));
    Ok(created("returns", id, accepted.repeated, receipt, view).await)
}

async fn supply(State(api): State<Arc<OrderApi>>, submission: Submission) -> Result<Response, Problem> {
    let (delivered, units) = match submission.body()? {
        NewSupply::Delivered(units) => (true, units),
        NewSupply::Adjusted(units) => (false, units),
    };
    units.iter().try_for_each(|change| sku(&change.sku))?;
    let supply = SupplyEvent::new(submission.id.clone(), delivered, units);
    let accepted = api.accept(&api.repositories.supplies, "supply", &submission, supply.clone()).await?;
    if accepted.first != supply {
        return Err(other_body());
    }
    let id = &submission.id;
    let view = accepted.watch.map(|watch| supply_view(&api, id, watch, !accepted.repeated));
    Ok(created("supplies", id, accepted.repeated, json!({"supply_id": id}), view).await)
}

async fn open_closing(State(api): State<Arc<OrderApi>>, submission: Submission) -> Result<Response, Problem> {
    let open = ClosingCommand::Open { closing_id: submission.id.clone() };
    let accepted = api.accept(&api.repositories.closings, "closing", &submission, open).await?;
    let id = &submission.id;
    let view = accepted.watch.map(|watch| closing_view(&api, id, watch, !accepted.repeated));
    Ok(created("closings", id, accepted.repeated, json!({"closing_id": id}), view).await)
}

async fn cancel(State(api): State<Arc<OrderApi>>, order: Id, headers: HeaderMap) -> Result<Response, Problem> {
    let order_id = id(order)?;
    // The cancellation is a request of its own, with an id different from that of the request that placed the order. A
    // repeated cancellation finds the order already cancelled.
    let request = asked(request("cancel", &order_id), &headers);
    let cancel = OrderCommand::Cancel { reason: BY_CUSTOMER.into() };
    match api.repositories.orders.execute(&order_id, cancel, request).await {
        Ok(_) => {}
        Err(ExecuteError::Refused(OrderRefusal::NotPlaced)) => return Err(unknown("order", &order_id)),
        Err(ExecuteError::Refused(refusal)) => return Err(Problem::new(StatusCode::CONFLICT, refusal.to_string())),
        Err(error) => return Err(error.into()),
    }
    let state = api.repositories.orders.state(&order_id).await;
    match state.map_err(|error| Problem::unavailable(without_files(&error)))? {
        Order::Cancelled(reason) => {
            Ok(Json(json!({"order_id": order_id, "status": "cancelled", "reason": reason})).into_response())
        }
        _ => Err(Problem::unavailable("the order was not cancelled; repeat the request")),
    }
}

async fn order(State(api): State<Arc<OrderApi>>, order: Id, time: Wait) -> Result<Json<OrderView>, Problem> {
    let order_id = id(order)?;
    let time = wait(time)?;
    let watch = api.watch(&api.repositories.orders, "checkout", &order_id, time)?;
    order_view(&api, &order_id, watch, false).await.map(Json)
}

async fn order_view(api: &OrderApi, order_id: &str, watch: Watch<'_>, is_new: bool) -> Result<OrderView, Problem> {
    let (events, saga) = api.look(&api.repositories.orders, order_id, watch, is_new).await?;
    let mut events = events.into_iter();
    let Some((placed_at, OrderEvent::Placed { customer, lines, total, currency, .. })) = events.next() else {
        return Err(unknown("order", order_id));
    };
    let mut status = "placed";
    let mut reason = None;
    for (_, event) in events {
        match event {
            OrderEvent::Placed { .. } => {}
            OrderEvent::Confirmed { .. } => status = "confirmed",
            OrderEvent::Cancelled { reason: why, .. } => {
                status = "cancelled";
                reason = Some(why);
            }
        }
    }
    let status = status.to_owned();
    Ok(OrderView { order_id: order_id.to_owned(), status, reason, customer, lines, total, currency, placed_at, saga })
}

async fn returned(State(api): State<Arc<OrderApi>>, returned: Id, time: Wait) -> Result<Json<ReturnView>, Problem> {
    let return_id = id(returned)?;
    let time = wait(time)?;
    let watch = api.watch(&api.repositories.returns, "return", &return_id, time)?;
    return_view(&api, &return_id, watch, false).await.map(Json)
}

async fn return_view(api: &OrderApi, return_id: &str, watch: Watch<'_>, is_new: bool) -> Result<ReturnView, Problem> {
    let (events, saga) = api.look(&api.repositories.returns, return_id, watch, is_new).await?;
    let mut events = events.into_iter();
    let Some((opened_at, ReturnEvent::Opened { customer, lines, total, currency, .. })) = events.next() else {
        return Err(unknown("return", return_id));
    };
    let completed = events.any(|(_, event)| matches!(event, ReturnEvent::Completed { .. }));
    let status = if completed { "completed" } else { "opened" }.to_owned();
    Ok(ReturnView { return_id: return_id.to_owned(), status, customer, lines, total, currency, opened_at, saga })
}

async fn supplied(State(api): State<Arc<OrderApi>>, supply: Id, time: Wait) -> Result<Json<SupplyView>, Problem> {
    let supply_id = id(supply)?;
    let time = wait(time)?;
    let watch = api.watch(&api.repositories.supplies, "supply", &supply_id, time)?;
    supply_view(&api, &supply_id, watch, false).await.map(Json)
}

async fn supply_view(api: &OrderApi, supply_id: &str, watch: Watch<'_>, is_new: bool) -> Result<SupplyView, Problem> {
    let (events, saga) = api.look(&api.repositories.supplies, supply_id, watch, is_new).await?;
    let supply = match events.into_iter().next() {
        Some((_, SupplyEvent::Delivered { units, .. })) => NewSupply::Delivered(units),
        Some((_, SupplyEvent::Adjusted { units, .. })) => NewSupply::Adjusted(units),
        None => return Err(unknown("supply", supply_id)),
    };
    Ok(SupplyView { supply_id: supply_id.to_owned(), supply, saga })
}

async fn closing(State(api): State<Arc<OrderApi>>, closing: Id, time: Wait) -> Result<Json<ClosingView>, Problem> {
    let closing_id = id(closing)?;
    let time = wait(time)?;
    let watch = api.watch(&api.repositories.closings, "closing", &closing_id, time)?;
    closing_view(&api, &closing_id, watch, false).await.map(Json)
}

async fn closing_view(
    api: &OrderApi,
    closing_id: &str,
    watch: Watch<'_>,
    is_new: bool,
) -> Result<ClosingView, Problem> {
    let (events, saga) = api.look(&api.repositories.closings, closing_id, watch, is_new).await?;
    let books = events.into_iter().find_map(|(_, event)| match event {
        ClosingEvent::Closed { books, .. } => Some(books),
        ClosingEvent::Opened { .. } => None,
    });
    let store = api.store_url.clone();
    let bus = api.bus_url.clone();
    Ok(ClosingView { closing_id: closing_id.to_owned(), books, store, bus, saga })
}

impl OrderApi {
    /// Watches the saga `saga` of the aggregate `id` for the time `wait`.
    fn watch<A: Aggregate>(
        &self,
        repository: &Repository<A>,
        saga: &str,
        id: &str,
        wait: Duration,
    ) -> Result<Watch<'_>, Problem> {
        self.sagas.watch(saga, stream(repository, id)?, wait)
    }

    /// Accepts a submission under its id. If an earlier submission has the same id, returns the first event of the earlier
    /// one, so that the caller can compare the two.
    async fn accept<A: Aggregate<Event: Clone>>(
        &self,
        repository: &Repository<A>,
        saga: &str,
        Submission { id, wait, headers, .. }: &Submission,
        command: A::Command,
    ) -> Result<Accepted<'_, A::Event>, Problem> {
        let watch = (!wait.is_zero()).then(|| self.watch(repository, saga, id, *wait)).transpose()?;
        let decided = repository.create(id, command, asked(request(A::CATEGORY, id), headers)).await?;
        let repeated = decided.repeated || decided.events.is_empty();
        if !repeated {
            self.accepted.with_label_values(&[A::CATEGORY]).inc();
        }
        let first = match decided.events.into_iter().next() {
            Some(first) => Some(first),
            // An earlier command has already accepted the submission.
            None => self.events(repository, id).await?.into_iter().next().map(|(_, event)| event),
        };
        first.map(|first| Accepted { first, repeated, watch }).ok_or_else(other_body)
    }

    /// Returns the events of the aggregate `id` and the view of its saga, once the saga has settled or the watch is
    /// over. The events are never older than the view. If the aggregate is new since the watch began, first waits for
    /// the signal that the saga has ended, and only then reads the events and the view.
    async fn look<A: Aggregate>(
        &self,
        repository: &Repository<A>,
        id: &str,
        watch: Watch<'_>,
        is_new: bool,
    ) -> Result<(History<A::Event>, Option<SagaView>), Problem> {
        let mut signalled = is_new && watch.end().await;
        loop {
            if signalled && let Some(Whole { saga, subject }) = watch.whole() {
                let view = watch.view_of(&saga)?;
                if view.as_ref().is_some_and(SagaView::has_settled) {
                    return Ok((decoded(&subject)?, view));
                }
            }
            // Reads the events and the view from the store concurrently.
            let (events, view) = tokio::join!(self.events(repository, id), watch.view());
            let events = events?;
            let mut view = view?;
            let has_settled = view.as_ref().is_some_and(SagaView::has_settled);
            if has_settled && signalled {
                return Ok((events, view));
            }
            if !has_settled && !watch.is_over() {
                signalled = watch.end().await;
                if signalled {
                    continue;
                }
                view = watch.view().await?;
            }
            return Ok((self.events(repository, id).await?, view));
        }
    }

    async fn events<A: Aggregate>(&self, repository: &Repository<A>, id: &str) -> Result<History<A::Event>, Problem> {
        let stream = stream(repository, id)?;
        let recorded = self.store.read_stream(&stream, Version::START, EVENTS_MAX).await;
        let events = decoded(&recorded.map_err(|error| Problem::unavailable(without_files(&error)))?)?;
        if events.is_empty() { Err(unknown(A::CATEGORY, id)) } else { Ok(events) }
    }
}

fn stream<A: Aggregate>(repository: &Repository<A>, id: &str) -> Result<StreamId, Problem> {
    repository.stream(id).map_err(|error| Problem::new(StatusCode::BAD_REQUEST, error.to_string()))
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

/// Builds the answer to the first request and to each repeated request; these answers differ only in one header. The
/// body is a view if the request waits, and a receipt otherwise. If the view cannot be read, the receipt confirms that
/// the submission was accepted.
async fn created<V: Serialize>(
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
