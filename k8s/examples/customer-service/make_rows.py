"""Synthetic help pages of shops that do not exist, in English and Chinese, with questions. `python make_rows.py FOLDER` writes
train.jsonl and test.jsonl there.

A page tells some facts about one shop, in any order. Of every three questions about it, one has no answer there. Training knows three
ways to tell each fact and three to ask for it; half of the test's pages tell and ask in ways that training has not seen, as the column
`part` says ("en seen", "en new", "zh seen", "zh new").
"""

from __future__ import annotations

import argparse
import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Ways:
    """To tell a fact, with {x} for the answer, and to ask for it."""

    told: tuple[str, ...]
    asked: tuple[str, ...]


@dataclass(frozen=True)
class Fact:
    """What may stand for {x}; the ways that training knows, and those that only the test does."""

    values: tuple[str, ...]
    seen: Ways
    new: Ways


def _each(pattern: str, numbers: range) -> tuple[str, ...]:
    return tuple(pattern.format(number) for number in numbers)


# fmt: off
ENGLISH = (
    Fact(_each("{} days", range(7, 60)),
         Ways(("Goods can be sent back within {x}.", "You may return what you bought for {x} after delivery.",
               "Returns are accepted for {x}."),
              ("How long can I return an item?", "Until when are returns possible?", "For how many days can goods be sent back?")),
         Ways(("If you do not like it, give it back before {x} are over.", "The right to withdraw ends after {x}."),
              ("I do not like it, how much time do I have to bring it back?", "What is the period for returns?"))),
    Fact(_each("{} days", range(2, 30)),
         Ways(("Refunds are made within {x}.", "You get your money back {x} after we receive a return.", "A refund takes {x}."),
              ("How long does a refund take?", "When do I get my money back?", "When are refunds made?")),
         Ways(("We repay the price after {x}.", "Allow {x} for the amount to be on your account again."),
              ("How long until I am paid back?", "After how many days is the price repaid?"))),
    Fact(_each("{} euros", range(3, 30)),
         Ways(("Shipping costs {x} for every order.", "We charge {x} for delivery.", "Delivery is {x}."),
              ("What does shipping cost?", "How much is delivery?", "What do you charge for shipping?")),
         Ways(("Add {x} for sending the parcel.", "The postage comes to {x}."),
              ("How expensive is it to have things sent to me?", "What is the delivery fee?"))),
    Fact(_each("{} euros", range(35, 150, 5)),
         Ways(("Shipping is free for orders over {x}.", "From {x} on you pay no delivery.", "Free delivery starts at {x}."),
              ("When is shipping free?", "From which amount is delivery free?", "How much must I order for free shipping?")),
         Ways(("We pay the postage if you spend more than {x}.", "Baskets above {x} are sent without a fee."),
              ("How much do I have to spend to save the delivery fee?", "What is the minimum for free delivery?"))),
    Fact(_each("{} working days", range(2, 15)),
         Ways(("Parcels arrive within {x}.", "An order is delivered after {x}.", "It takes {x} until a parcel is there."),
              ("When will my order arrive?", "How long does delivery take?", "How fast do you deliver?")),
         Ways(("What you order is with you in {x}.", "Expect the postman after {x}."),
              ("How many days do I wait for my parcel?", "What is the delivery time?"))),
    Fact(("PayPal", "bank transfer", "credit card", "invoice", "gift card", "direct debit", "cash on delivery"),
         Ways(("Orders are paid by {x}.", "We accept payment by {x} only.", "The way to pay is {x}."),
              ("How can I pay?", "Which payment do you accept?", "What are the ways to pay?")),
         Ways(("At the checkout choose {x}.", "Settle the bill by {x}."),
              ("By what means is an order settled?", "What payment method is there?"))),
    Fact(_each("{} months", range(6, 61)),
         Ways(("All products have a warranty of {x}.", "The guarantee lasts {x}.", "Defects are repaired free of charge for {x}."),
              ("How long is the warranty?", "How long does the guarantee last?", "For how long are repairs free?")),
         Ways(("What breaks in the first {x} is mended for nothing.", "We stand by our goods for {x}."),
              ("It broke, until when do you mend it for nothing?", "What is the warranty period?"))),
    Fact(tuple(f"{a} am to {b} pm" for a in range(6, 12) for b in range(4, 11)),
         Ways(("The hotline answers from {x}.", "You can call us {x}.", "Our telephones are staffed {x}."),
              ("When can I call you?", "What are the hours of the hotline?", "When do you answer the telephone?")),
         Ways(("Talk to a person on the phone {x}.", "Our agents pick up {x}."),
              ("At what time is somebody there to talk to?", "When is your phone line open?"))),
)
CHINESE = (
    Fact(_each("{}天", range(7, 60)),
         Ways(("商品在{x}内可以退货。", "收货后{x}可退。", "我们接受{x}以内的退货。"),
              ("多久可以退货?", "退货期限是多长?", "几天之内能退?")),
         Ways(("不满意请在{x}之内寄回。", "无理由退换期为{x}。"),
              ("不喜欢的话多长时间能寄回?", "退货时间有多久?"))),
    Fact(_each("{}天", range(2, 30)),
         Ways(("退款在{x}内完成。", "收到退货后{x}退款。", "退款需要{x}。"),
              ("退款要多久?", "什么时候能拿到退款?", "退款几天到账?")),
         Ways(("货款会在{x}后返还。", "钱款{x}内回到您的账户。"),
              ("钱多久能返还给我?", "几天能把钱退回来?"))),
    Fact(_each("{}元", range(3, 30)),
         Ways(("每单运费{x}。", "我们收取{x}的运费。", "送货费为{x}。"),
              ("运费多少?", "送货要多少钱?", "邮费是多少?")),
         Ways(("寄送另收{x}。", "快递费用是{x}。"),
              ("寄过来要花多少钱?", "快递费怎么算?"))),
    Fact(_each("{}元", range(35, 300, 5)),
         Ways(("满{x}免运费。", "订单超过{x}包邮。", "{x}以上不收运费。"),
              ("满多少免运费?", "多少钱包邮?", "买多少可以免运费?")),
         Ways(("消费达到{x},快递费由我们付。", "购物满{x}免费寄送。"),
              ("要花多少才不用付快递费?", "免费寄送的最低金额是多少?"))),
    Fact(_each("{}个工作日", range(2, 15)),
         Ways(("包裹在{x}内送到。", "下单后{x}送达。", "送货需要{x}。"),
              ("我的订单什么时候到?", "送货要多久?", "多久能送到?")),
         Ways(("您订的东西{x}后到家。", "快递路上要{x}。"),
              ("要等几天才能收到包裹?", "快递多长时间?"))),
    Fact(("微信支付", "支付宝", "银行转账", "信用卡", "礼品卡", "货到付款", "现金"),
         Ways(("订单用{x}付款。", "我们只接受{x}。", "付款方式是{x}。"),
              ("怎么付款?", "你们接受什么付款方式?", "可以用什么支付?")),
         Ways(("结账时请选{x}。", "用{x}买单。"),
              ("付钱有什么办法?", "用什么方式结账?"))),
    Fact(_each("{}个月", range(6, 61)),
         Ways(("所有产品保修{x}。", "保修期为{x}。", "{x}内免费维修。"),
              ("保修多久?", "保修期多长?", "多长时间内免费维修?")),
         Ways(("{x}之内坏了,修理不收钱。", "质保时长{x}。"),
              ("坏了多久之内可以免费修?", "质保时间是多少?"))),
    Fact(tuple(f"早上{a}点到晚上{b}点" for a in range(6, 12) for b in range(5, 11)),
         Ways(("客服热线{x}接听。", "您可以在{x}给我们打电话。", "电话服务时间是{x}。"),
              ("什么时候可以打电话?", "客服热线几点上班?", "电话什么时候有人接?")),
         Ways(("人工客服{x}在线。", "{x}有人和您通话。"),
              ("几点能找到人说话?", "客服几点到几点在?"))),
)
# fmt: on
FACTS = {"en": ENGLISH, "zh": CHINESE}
NAMES = {
    "en": ("North", "River", "Blue", "Old Mill", "Sunny", "Green", "City", "Harbour"),
    "zh": ("东方", "大山", "小河", "金星", "天天", "明月", "长江", "新生"),
}
GOODS = {"en": ("Books", "Shoes", "Bikes", "Tea", "Toys", "Lamps"), "zh": ("书店", "鞋店", "茶行", "车行", "灯具", "玩具")}
WELCOME = {"en": "Welcome to {} {}.", "zh": "欢迎来到{}{}。"}
BETWEEN = {"en": " ", "zh": ""}


def make_page(draw: random.Random, language: str, *, new: bool) -> list[dict[str, Any]]:
    """Three questions about one page, of which one has no answer there."""
    told = draw.sample(FACTS[language], draw.randint(4, 6))
    context = WELCOME[language].format(draw.choice(NAMES[language]), draw.choice(GOODS[language]))
    answers = {}
    for fact in told:
        sentence, value = draw.choice(fact.new.told if new else fact.seen.told), draw.choice(fact.values)
        context += BETWEEN[language]
        answers[fact] = {"text": [value], "answer_start": [len(context) + sentence.index("{x}")]}
        context += sentence.replace("{x}", value)
    untold = draw.choice([fact for fact in FACTS[language] if fact not in told])
    part = f"{language} {'new' if new else 'seen'}"
    return [
        {
            "context": context,
            "question": draw.choice(fact.new.asked if new else fact.seen.asked),
            "answers": answers.get(fact, {"text": [], "answer_start": []}),
            "part": part,
        }
        for fact in [*draw.sample(told, 2), untold]
    ]


def make_rows(num_pages: int, seed: int, *, test: bool) -> list[dict[str, Any]]:
    """Rows in the form of SQuAD v2: every other page is Chinese, and in the test half of each language's are in new words."""
    draw = random.Random(seed)
    pages = [make_page(draw, "en" if i % 2 else "zh", new=test and i % 4 >= 2) for i in range(num_pages)]
    return [row for page in pages for row in page]


def write(folder: Path, *, num_train: int = 800, num_test: int = 400, seed: int = 17) -> None:
    """train.jsonl and test.jsonl, of so many pages; no page of the test stands in training."""
    train = make_rows(num_train, seed, test=False)
    known = {row["context"] for row in train}
    test = [row for row in make_rows(num_test, seed + 1, test=True) if row["context"] not in known]
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in (("train", train), ("test", test)):
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    write(parser.parse_args().folder)
