"""The words tasks are made of, English and Chinese, and the border between training and held-out.

A word stands on one side only, whichever pools it is in and in either language; numbers are split the same way.
Tasks store the English word, and `translate` gives the Chinese one, so that a task is the same in both.
"""

from __future__ import annotations

from functools import cache
from types import MappingProxyType

from coterie.types import Split


def _pairs(text: str) -> tuple[tuple[str, str], ...]:
    return tuple((english.replace("_", " "), chinese) for english, chinese in (p.split("=") for p in text.split()))


_POOLS: dict[str, tuple[str, str]] = {
    "positive": (
        "great=很棒 lovely=可爱 excellent=优秀 wonderful=美妙 amazing=惊人 pleasant=愉快 brilliant=精彩 superb=极好 "
        "charming=迷人 fantastic=了不起 perfect=完美 beautiful=美丽 enjoyable=有趣 good=好",
        "delightful=令人欢喜 splendid=辉煌 marvelous=绝妙 gorgeous=华丽 impressive=令人赞叹 fabulous=出色 "
        "outstanding=杰出 magnificent=壮丽",
    ),
    "negative": (
        "awful=糟糕 terrible=可怕 horrible=恐怖 boring=无聊 nasty=恶劣 ugly=丑陋 dreadful=糟透 poor=差劲 dull=乏味 "
        "disappointing=令人失望 bad=坏 unpleasant=不快 annoying=烦人 weak=薄弱",
        "dismal=惨淡 lousy=低劣 disgusting=恶心 miserable=悲惨 tedious=冗长 pathetic=可悲 shabby=破旧 ridiculous=荒唐",
    ),
    "subject": (
        "soup=汤 film=电影 hotel=酒店 book=书 song=歌 room=房间 meal=饭菜 show=演出 trip=旅行 music=音乐 dinner=晚餐 "
        "service=服务",
        "concert=音乐会 play=话剧 garden=花园 lecture=讲座 cake=蛋糕 museum=博物馆 party=聚会 speech=演讲",
    ),
    "opener": (
        "It_was_cheap=价格便宜 We_came_late=我们来晚了 It_was_raining=当时下雨 Many_people_came=来了很多人",
        "It_was_far_away=路很远 The_day_was_long=那天很长 Nobody_told_us=没人告诉我们 It_was_crowded=人很挤",
    ),
    "animal": (
        "dog=狗 horse=马 cow=牛 pig=猪 sheep=绵羊 lion=狮子 bear=熊 wolf=狼 duck=鸭子 mouse=老鼠 rabbit=兔子 goat=山羊",
        "cat=猫 tiger=老虎 fox=狐狸 deer=鹿 monkey=猴子 frog=青蛙 eagle=老鹰 donkey=驴",
    ),
    "food": (
        "bread=面包 cheese=奶酪 rice=米饭 meat=肉 butter=黄油 egg=鸡蛋 sugar=糖 honey=蜂蜜 noodles=面条 cookie=饼干 "
        "salad=沙拉 sandwich=三明治",
        "pizza=披萨 chocolate=巧克力 sausage=香肠 pancake=煎饼 yogurt=酸奶 pasta=意面 pie=馅饼 candy=糖果",
    ),
    "clothing": (
        "shirt=衬衫 dress=裙子 jacket=夹克 sock=袜子 glove=手套 scarf=围巾 belt=腰带 boot=靴子 sweater=毛衣 "
        "skirt=短裙 trousers=裤子 cap=便帽",
        "coat=大衣 jeans=牛仔裤 sandal=凉鞋 tie=领带 shoe=鞋 vest=背心 hoodie=连帽衫 blouse=女衬衫",
    ),
    "tool": (
        "hammer=锤子 saw=锯子 drill=钻头 shovel=铲子 axe=斧头 wrench=扳手 ladder=梯子 rake=耙子 knife=刀 chisel=凿子 "
        "pliers=钳子 broom=扫帚",
        "screwdriver=螺丝刀 scissors=剪刀 brush=刷子 rope=绳子 spade=铁锹 file=锉刀 needle=针 mop=拖把",
    ),
    "place": (
        "near_the_door=门边 on_the_table=桌上 in_the_box=箱子里 under_the_window=窗下 by_the_wall=墙边 "
        "in_the_corner=角落",
        "behind_the_house=屋后 on_the_floor=地上 in_the_yard=院子里 next_to_the_stairs=楼梯旁",
    ),
    "thing": (
        "river=河 lamp=灯 stone=石头 cloud=云 bridge=桥 paper=纸 tree=树 road=路 bird=鸟 glass=玻璃 fire=火 "
        "snow=雪 ship=船 bell=钟 wind=风 star=星 field=田野 clock=时钟 door=门 mountain=山",
        "ocean=海洋 candle=蜡烛 leaf=叶子 rain=雨 tower=塔 mirror=镜子 flower=花 street=街 moon=月亮 sand=沙 "
        "forest=森林 drum=鼓",
    ),
    "goods": (
        "pen=钢笔 cup=杯子 chair=椅子 ball=球 bag=包 box=盒子 plate=盘子 phone=电话 bottle=瓶子 basket=篮子 "
        "camera=相机 pillow=枕头",
        "spoon=勺子 desk=书桌 bowl=碗 radio=收音机 towel=毛巾 fork=叉子 blanket=毯子 kettle=水壶",
    ),
    "colour": (
        "red=红色 blue=蓝色 green=绿色 black=黑色 white=白色 yellow=黄色",
        "brown=棕色 pink=粉色 gray=灰色 orange=橙色 purple=紫色",
    ),
    "item": (
        "cup=杯子 hat=帽子 car=汽车 ball=球 key=钥匙 bag=包 pen=钢笔 box=盒子 ring=戒指 boat=小船",
        "truck=卡车 mask=面具 desk=书桌 bike=自行车 guitar=吉他 flag=旗子",
    ),
}

_LABELS = "positive=正面 negative=负面 animal=动物 food=食物 clothing=衣物 tool=工具"

POOLS = MappingProxyType(
    {
        name: MappingProxyType({Split.TRAIN: _pairs(train), Split.HELDOUT: _pairs(heldout)})
        for name, (train, heldout) in _POOLS.items()
    }
)


def words(pool: str, split: Split) -> tuple[str, ...]:
    """English words of one side of a pool."""
    return tuple(english for english, _ in POOLS[pool][split])


@cache
def _chinese() -> dict[str, str]:
    table = dict(_pairs(_LABELS))
    for sides in POOLS.values():
        for pairs in sides.values():
            table.update(pairs)
    return table


def translate(word: str, language: str) -> str:
    """An English word of a pool or a label in `language`; numbers and unknown words stay as they are."""
    return _chinese().get(word, word) if language == "zh" else word


@cache
def numbers(split: Split, low: int, high: int) -> tuple[int, ...]:
    """Numbers low..high of one side: every fifth is held out."""
    return tuple(n for n in range(low, high + 1) if (n % 5 == 2) is (split is Split.HELDOUT))
